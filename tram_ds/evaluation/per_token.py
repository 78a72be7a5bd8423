"""Perplexities are per token: what says whether those of two models are of the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tram_ds.data.tokenize import tokenizer_digest


def tokens_of(task: Any) -> dict[str, str]:
    """What decides the tokens that a language model's task counts; empty for other tasks."""
    if task.metric != "perplexity":
        return {}
    found = {"tokenizer": tokenizer_digest(task.tokenizer)[:12]}
    if hasattr(task, "bos"):
        found["bos"] = task.bos
    elif template := getattr(task.tokenizer, "chat_template", None):
        found["chat template"] = hashlib.sha256(str(template).encode()).hexdigest()[:12]
    return found


def told_apart(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines below a table of models that were not scored on the same tokens; none where they
    were."""
    counted = [entry.get("tokens") or {} for entry in models]
    keys = dict.fromkeys(key for tokens in counted for key in tokens)
    return [
        f"not comparable: perplexities are per token, and the models have another {key}: "
        + ", ".join(
            f"{entry['name']} {tokens.get(key, 'none')}"
            for entry, tokens in zip(models, counted, strict=True)
        )
        for key in keys
        if len({tokens.get(key) for tokens in counted}) > 1
    ]

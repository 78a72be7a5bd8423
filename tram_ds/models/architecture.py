"""Which Hugging Face architecture a `model.path` is, and the two-layer version of it that --smoke
trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FAMILIES = [  # pattern of a model path, lower case -> Hugging Face model type; the first match wins
    (r"gpt-?2", "gpt2"),
    (r"pythia|gpt-?neox", "gpt_neox"),
    (r"xlm-?r", "xlm-roberta"),
    (r"deberta", "deberta-v2"),
    (r"roberta", "roberta"),
    (r"bert", "bert"),
    (r"deit", "deit"),
    (r"dinov2", "dinov2"),
    (r"\bvit\b|vit-", "vit"),
    (r"llama|vicuna|smollm|stories", "llama"),
    (r"mixtral", "mixtral"),
    (r"mistral|zephyr", "mistral"),
    (r"qwen3", "qwen3"),
    (r"qwen", "qwen2"),
    (r"gemma", "gemma"),
    (r"opt-", "opt"),
]
BY_TASK = {
    "language_modeling": "gpt2",
    "instruction": "llama",
    "entailment": "xlm-roberta",
    "image_classification": "vit",
}
TINY = {  # whatever of this an architecture's configuration has is set by --smoke
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 66,
    "image_size": 32,
    "patch_size": 8,
}


def family(path: str | None, task: str) -> str:
    """The architecture of `model.path`: what its config.json says, else by its name, else the
    task's usual one."""
    config = Path(path or "") / "config.json"
    if path and config.is_file():
        try:
            return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
        except (OSError, ValueError, KeyError, TypeError):
            # an unreadable folder is reported when the model is loaded; a smoke run does not load
            # it
            pass
    named = [kind for pattern, kind in FAMILIES if re.search(pattern, (path or "").lower())]
    return named[0] if named else BY_TASK.get(task, "gpt2")


def tiny(architecture: str) -> dict[str, Any]:
    """`model.init` of a two-layer model of this architecture; unknown ones are left for the task to
    report."""
    # lazily: only smoke runs need it
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if architecture not in CONFIG_MAPPING:
        return {"architecture": architecture}
    config = CONFIG_MAPPING[architecture]()
    # also the common names: GPT-2's config calls its hidden_size n_embd
    keys = {*config.to_dict(), *config.attribute_map}
    return {
        "architecture": architecture,
        **{key: value for key, value in TINY.items() if key in keys},
    }

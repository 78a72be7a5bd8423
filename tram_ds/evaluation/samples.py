"""A few continuations of given prompts, greedily, so that a person sees what the scores are of.

Communication: every rank calls the engine's own forward pass with the same prompts, as many times
as the others, so that the collectives inside a sharded model match: after each token the ranks
agree on whether to go on. What counts is rank 0's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tram_ds.evaluation.score import evaluation_mode
from tram_ds.models.pretrained import load_outline
from tram_ds.recipe.file import RecipeError
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.ranks import agreed
from tram_ds.tasks import causal


def generate(
    model: nn.Module,
    task: Any,
    prompts: Sequence[str],
    tokens: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> list[dict[str, str]]:
    """[{"prompt", "text", "ended"}]: the text that follows each prompt, of at most `tokens` tokens.
    ended: `end` where the model ended it itself, else `length`. Collective."""
    asked, ends = [task.prompt(text) for text in prompts], task.ends()
    batches = [asked[i : i + batch_size] for i in range(0, len(asked), batch_size)]
    with torch.no_grad(), evaluation_mode(model):
        found = [ids for b in batches for ids in continued(model, b, tokens, ends, device)]
    return [
        {
            "prompt": prompt,
            "text": task.tokenizer.decode(ids, skip_special_tokens=True),
            "ended": "end" if ids[-1] in ends else "length",
        }
        for prompt, ids in zip(prompts, found, strict=True)
    ]


def continued(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    ends: Collection[int],
    device: torch.device | str,
) -> list[list[int]]:
    """The ids that follow each prompt, the end's included. Rows are padded on the right, where
    nothing that counts looks; every token is a forward pass of its own over all that precedes it,
    without a cache, as training calls the model. Collective."""
    rows, going = [list(prompt) for prompt in prompts], set(range(len(prompts)))
    for _ in range(tokens):
        ids, mask = causal.right_padded([np.asarray(row) for row in rows], 0)
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        logits = model(**causal.inputs(batch)).logits
        # the last real position: behind it there is padding
        nearest = {i: int(logits[i, len(rows[i]) - 1].argmax()) for i in going}
        for i, token in nearest.items():
            rows[i].append(token)
        going -= {i for i, token in nearest.items() if token in ends}
        # by the ranks together: one that left alone would leave the others in a sharded forward
        if not agreed(bool(going)):
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def check(recipe: Recipe, task: Any) -> None:
    """RecipeError for a prompt that leaves no room for what is to follow it, or is no token.
    Reads no weight."""
    wanted = recipe.eval.generate
    if wanted is None:
        return
    config = task.model(load_outline).config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    problems = list(_problems([len(task.prompt(text)) for text in wanted.prompts], wanted, room))
    if problems:
        lines = (f"recipe {recipe.name}: eval.generate.{problem}" for problem in problems)
        raise RecipeError("\n".join(lines))


def _problems(lengths: Sequence[int], wanted: Any, room: int | None) -> Iterator[str]:
    for number, length in enumerate(lengths, start=1):
        if not length:
            yield f"prompts: prompt {number} is no token: write more"
        if room is not None and length + wanted.max_tokens > room:
            yield (
                f"max_tokens = {wanted.max_tokens}: with the {length} tokens of prompt {number} "
                f"more than the model's {room} positions: shorten one of the two"
            )

"""Weights that a model's config ties although its files hold each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tram_ds.models.stored import CHUNK, Entry, NotSlices, Stored


def refuse_different(model: Any, files: Mapping[str, Entry]) -> None:
    """NotSlices where two weights that were tied have different values in the files: transformers
    compares them and leaves such a pair apart, which it cannot where it has no values. Reads a
    CHUNK of each at a time, and nothing where the files hold one of them, or one twice."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        one, two = (_entry(model, name, files) for name in (target, source))
        # one is two: the files have it once, under either name
        if one is not None and two is not None and one is not two and not _same(one, two):
            raise NotSlices(
                f"its {target} and {source} are tied by its config and differ in its files"
            )


def _entry(model: Any, name: str, files: Mapping[str, Entry]) -> Entry | None:
    """Of a parameter: files have its name with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    names = (name, name.removeprefix(prefix), prefix + name)
    return next((files[key] for key in names if key in files), None)


def _same(one: Entry, two: Entry) -> bool:
    """As fp32, which is what a model is loaded as."""
    if one.shape != two.shape:
        return False
    both, count = Stored({"one": one, "two": two}, {}), torch.Size(one.shape).numel()
    for start in range(0, count, CHUNK):
        parts = [torch.empty(min(CHUNK, count - start)) for _ in range(2)]
        for name, into in zip(("one", "two"), parts, strict=True):
            both.read(name, start, into)
        if not torch.equal(*parts):
            return False
    return True

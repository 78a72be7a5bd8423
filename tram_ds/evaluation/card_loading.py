"""How an export is loaded, as the lines of Python that a person copies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tram_ds.recipe.recipe import Recipe


class Kind(NamedTuple):
    """Of a task's models: transformers' classes, and the hub's name of what they do."""

    model: str
    beside: str
    pipeline: str


_TEXT = Kind("AutoModelForCausalLM", "AutoTokenizer", "text-generation")
KINDS = {
    "language_modeling": _TEXT,
    "instruction": _TEXT,
    "entailment": Kind(
        "AutoModelForSequenceClassification", "AutoTokenizer", "text-classification"
    ),
    "image_classification": Kind(
        "AutoModelForImageClassification", "AutoImageProcessor", "image-classification"
    ),
}


def loading(recipe: Recipe, facts: Mapping[str, Any], *, whole: bool, adapter: str | None) -> str:
    """Markdown. whole: the folder has all of the model. adapter: where in it the adapters are, ""
    for the folder itself; None for none."""
    kind = KINDS[recipe.task.name]
    parts = []
    if whole:
        lines = [
            f"from transformers import {kind.model}, {kind.beside}",
            "",
            f'model = {kind.model}.from_pretrained("FOLDER")',
            f"{'processor' if 'Image' in kind.beside else 'tokenizer'} = "
            f'{kind.beside}.from_pretrained("FOLDER")',
        ]
        parts.append(_fenced(lines))
    if adapter is not None and recipe.model.path is None:
        parts.append(
            "The adapters alone need the model that they were trained on, which this run drew "
            "from its seed (`model.init`): `tram export RUN --merge --out FOLDER` makes it again."
        )
    elif adapter is not None:
        parts.append(_adapters(recipe, facts, kind, adapter, whole))
    return "\n\n".join(["`FOLDER` is this folder, or its name on the hub.", *parts])


def _adapters(
    recipe: Recipe, facts: Mapping[str, Any], kind: Kind, adapter: str, whole: bool
) -> str:
    base, options = facts.get("base_model"), ""
    if base and recipe.model.revision:
        options += f', revision="{recipe.model.revision}"'
    if facts.get("num_labels"):
        options += f", num_labels={facts['num_labels']}"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {kind.model}",
        "",
        f'base = {kind.model}.from_pretrained("{base or "BASE"}"{options})',
        f'model = PeftModel.from_pretrained(base, "{"/".join(filter(None, ("FOLDER", adapter)))}")',
    ]
    start = "The adapters alone, on the model that they were trained on" if whole else "On the base"
    named = "" if base else f" (`BASE`, the model called `{Path(str(recipe.model.path)).name}`)"
    return f"{start}{named}:\n\n{_fenced(lines)}"


def _fenced(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])

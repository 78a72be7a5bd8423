"""Like with like: what a score is measured with, and the runs that were measured alike."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tram_ds.comparison.runs import Run
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.numbers import SAME_NUMBERS
from tram_ds.recipe.sections import EvalSection
from tram_ds.recipe.task_section import TaskSection

SECTIONS: dict[str, Any] = {"task": TaskSection, "model": ModelSection, "eval": EvalSection}
DATA = ("task.data", "task.revision")
CHOICE = ("task.train", "task.eval", "task.exclude")  # which columns there are
# keys of these sections that say how a model is trained, not how it is scored; a moving average of
# the weights is another model, scored in the same way
TRAINING = (
    *CHOICE,
    "eval.weights",
    "task.max_train_tokens",
    "model.activation_checkpointing",
    "model.compile",
    "model.dropout",
    "model.logits",
)
DIGEST = "data digest"


def alike(runs: Sequence[Run], columns_are_data: bool) -> list[tuple[str, list[Run]]]:
    """(what tells them apart, runs) of every group that was scored alike: "" where there is one.

    columns_are_data: each column is a data set of its own (images), so that only the other keys
    must agree.
    """
    scored = [_scored(run, columns_are_data) for run in runs]
    _add_digests(runs, scored)
    differing = sorted(
        key for key in {k for s in scored for k in s} if len({s.get(key) for s in scored}) > 1
    )
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, said in zip(runs, scored, strict=True):
        groups[", ".join(f"{key} = {said.get(key, 'unset')}" for key in differing)].append(run)
    return list(groups.items())


def _scored(run: Run, columns_are_data: bool) -> dict[str, str]:
    left_out = {*SAME_NUMBERS, *TRAINING, *(DATA if columns_are_data else ())}
    found: dict[str, str] = {}
    for name, section in SECTIONS.items():
        defaults = {
            key: field.default
            for key, field in section.model_fields.items()
            if not field.is_required()
        }
        for key, value in (defaults | dict(run.recipe.get(name) or {})).items():
            if f"{name}.{key}" not in left_out:
                found |= _flat(f"{name}.{key}", value)
    return found


def _flat(key: str, value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {k: v for inner, x in value.items() for k, v in _flat(f"{key}.{inner}", x).items()}
    return {key: json.dumps(value, default=str).strip('"')}


def _add_digests(runs: Sequence[Run], scored: Sequence[dict[str, str]]) -> None:
    """Of runs of one data set and choice of domains, those of other content are unlike. The digest
    covers the chosen domains, so it says nothing between other choices."""
    chosen: dict[str, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        task = run.recipe["task"]
        named = [task.get(key.partition(".")[2]) for key in (*DATA, *CHOICE)]
        chosen[json.dumps([*named, sorted(run.scores)], default=str)].append(i)
    for members in chosen.values():
        digests = {d for i in members if (d := runs[i].tags.get("data_digest"))}
        if len(digests) > 1:
            for i in members:
                scored[i][DIGEST] = runs[i].tags.get("data_digest", "unknown")[:12]

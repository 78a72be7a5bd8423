"""Which domains, or languages, of a source a run is trained on and scored on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from tram_ds.data.sources import unknown_domain
from tram_ds.runtime.errors import DataError

Splits = Callable[[str], Collection[str]]  # domain -> its splits


def chosen(
    task: Any, there: Sequence[str], splits: Splits, what: str = "domain"
) -> tuple[list[str], list[str]]:
    """(training domains, scored ones with the training ones first), as `train`, `eval` and
    `exclude` of the task say. what: a domain is in messages. DataError for one that is not
    there."""
    named = [task.train] if task.train not in (None, "all") else []
    for name in [*task.exclude, *(task.eval or []), *named]:
        if name not in there:
            raise unknown_domain(name, there, f"task.data {task.data}")
    kept = [name for name in there if name not in task.exclude]
    trainable = [name for name in kept if "train" in splits(name)]
    if not trainable and not named:
        has = ", ".join(f"{name} ({' and '.join(splits(name)) or 'none'})" for name in kept[:3])
        raise DataError(
            f"no {what} of task.data {task.data} outside task.exclude has a train split"
            + (f": {has}{', ...' if len(kept) > 3 else ''}" if kept else ": all are excluded")
        )
    train = trainable if task.train == "all" else [task.train or trainable[0]]
    return train, list(dict.fromkeys([*train, *(kept if task.eval is None else task.eval)]))


def scored(evaluated: Sequence[str], train: Sequence[str], split: str, splits: Splits) -> list[str]:
    """Those of `evaluated` that are scored on a split: only zero-shot ones may lack a split that is
    not `test`."""
    return [name for name in evaluated if split == "test" or name in train or split in splits(name)]

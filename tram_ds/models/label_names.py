"""Classes of data and model are one by their names: a checkpoint's `id2label` tells its order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tram_ds.runtime.errors import DataError

UNNAMED = re.compile(r"label[ _]?\d+", re.IGNORECASE)  # transformers' names for classes without any


def numbers_by_name(path: str | None, config: Any, classes: Sequence[str], where: str) -> Tensor:
    """(len(classes),) int64: the number that a model of this config gives each of `classes`.

    Those of the data where the model is new, its head has another size, or its classes carry no
    names. Small and capital letters are one where that leaves names different. DataError, with
    both lists, where as many classes have other names: the head was trained for something else.
    """
    own = None if path is None else _names(config, len(classes))
    if own is None:
        return torch.arange(len(classes))
    for fold in (str, str.lower):
        place = {fold(name): number for number, name in enumerate(own)}
        wanted = [fold(str(name)) for name in classes]
        if len(place) == len(own) and sorted(place) == sorted(wanted):
            return torch.tensor([place[name] for name in wanted])
    raise DataError(
        f"the classes of model.path '{path}' are called {_some(own)} (id2label of its "
        f"config.json), those of {where} {_some(classes)}: name them alike; or, for a new head, "
        "save the model without its own (AutoModel.from_pretrained(...).save_pretrained(...)) and "
        "remove id2label and label2id"
    )


def set_label_names(config: Any, classes: Sequence[str], numbers: Tensor) -> None:
    """id2label and label2id of a model that numbers `classes` so."""
    named = sorted(zip(numbers.tolist(), classes, strict=True))
    config.id2label = dict(named)
    config.label2id = {name: number for number, name in named}


def _names(config: Any, count: int) -> list[str] | None:
    """The config's own names by number, if it has `count` of them."""
    named = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    if sorted(named) != list(range(count)):
        return None
    names = [named[number] for number in range(count)]
    return None if all(UNNAMED.fullmatch(name) for name in names) else names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")

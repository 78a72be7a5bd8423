"""Weights that are there as a pickle alone (`pytorch_model.bin`): looked into before they are
loaded, so that what is wrong with them is said by name. No code of theirs is ever run."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from tram_ds.models.stored import find
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import first_line


def check(path: str, revision: str) -> None:
    """DataError for a folder or hub name whose pickled weights would be loaded and are cut, lack a
    file, or are anything else than tensors by name. Nothing where it has safetensors. Reads what
    the tensors are called, not their values."""
    for file in files(path, revision):
        look_into(file)


def files(path: str, revision: str) -> list[Path]:
    """The files of pickled weights of a folder or hub name; none where it has safetensors.
    DataError for a folder that has neither, and where the index names a file that is not there."""
    if any(find(path, name, revision) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return []
    single = find(path, WEIGHTS_NAME, revision)
    if single is not None:
        return [single]
    index = find(path, WEIGHTS_INDEX_NAME, revision)
    if index is not None:
        return [_part(path, name, revision) for name in _named(index)]
    if Path(path).is_dir():
        raise DataError(
            f"'{path}' has no weights that are read ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, or an "
            "index of several): load them with the library that wrote them, and write them by "
            "save_pretrained of transformers"
        )
    return []


def _part(path: str, name: str, revision: str) -> Path:
    part = find(path, name, revision) if Path(name).name == name else None
    if part is None:
        raise DataError(
            f"'{path}' lacks {name}, which {WEIGHTS_INDEX_NAME} names: get the whole set"
        )
    return part


def _named(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged ({error!r}): get it again") from error


def look_into(file: Path) -> None:
    """DataError where `file` is cut, or anything else than tensors by name."""
    # meta: names and shapes, without the memory of the values
    _load(file, "meta")


def tensors(file: Path) -> Mapping[str, Tensor]:
    """What is in it, by name, left in the file and mapped; in memory where it is of torch's older
    format, which is no archive. DataError as look_into."""
    return _load(file, "cpu")


def _load(file: Path, device: str) -> Mapping[str, Tensor]:
    with file.open("rb") as stream:
        if stream.read(24).startswith(b"version https://git-lfs"):
            raise DataError(f"{file} is a pointer of git-lfs: run `git lfs pull`")
    try:
        # of a file in torch's older format the values are always read
        found: Any = torch.load(
            file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file) or None
        )
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} is damaged, or would run code when it is read, which is not done "
            f"({_reason(error)}): get it again, as safetensors where there is such a copy"
        ) from error
    except NotImplementedError as error:  # of a device that has no such tensors
        raise DataError(
            f"{file} holds tensors that are not numbers as they are, but codes of them: give a "
            "model that is not quantised"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError) as error:
        raise DataError(f"{file} is cut or damaged ({first_line(error)}): get it again") from error
    held = found.items() if isinstance(found, Mapping) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held):
        raise DataError(
            f"{file} holds more than a model's weights by name, as a checkpoint of training does: "
            "give the folder that save_pretrained of transformers wrote"
        )
    return found


def _reason(error: Exception) -> str:
    """The line of torch's long text that says what was found, and not its advice to run it."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "GLOBAL" in line or "nsupported" in line]
    return told[0].split(" Please ")[0] if told else "no weights alone"

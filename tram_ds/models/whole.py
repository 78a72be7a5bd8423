"""Whether the weights in a folder are whole, from names and headers alone: found before anything is
built, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tram_ds.runtime.errors import DataError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def refuse_incomplete(folder: Path) -> None:
    """DataError where a shard, the index or a part of a file of safetensors weights is missing.
    Nothing for a folder without any: other formats are read, or refused, by transformers."""
    found = sorted(p.name for p in folder.iterdir() if SHARD.fullmatch(p.name))
    if (folder / WEIGHTS).is_file():  # what transformers takes first
        _tensors(folder / WEIGHTS)
        return
    if not (folder / INDEX).is_file():
        if found:
            raise DataError(f"{folder} lacks {INDEX}, which says what {', '.join(found[:3])} hold")
        return
    placed = _index(folder / INDEX)
    if odd := sorted(name for name in set(placed.values()) if Path(name).name != name):
        raise DataError(f"{folder / INDEX} names {odd[0]!r}, which is not a file of its folder")
    named = set(placed.values())
    for total in {int(match[2]) for name in named if (match := SHARD.fullmatch(name))}:
        named |= {f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)}
    if absent := sorted(name for name in named if not (folder / name).is_file()):
        raise DataError(
            f"{folder} lacks {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''} of "
            f"{len(named)} shards: get the whole set"
        )
    for name in sorted(set(placed.values())):
        promised = {tensor for tensor, file in placed.items() if file == name}
        if lost := sorted(promised - _tensors(folder / name)):
            raise DataError(
                f"{folder / name} lacks {lost[0]}, which {INDEX} places there: the two are of "
                "different sets; get the whole set"
            )


def _index(path: Path) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in placed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): get it again") from error


def _tensors(path: Path) -> set[str]:
    """Names of a file's tensors; its header must fit its size."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        why = f"{error}; get it again"
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git"):
            why = "it is a pointer of git-lfs: run `git lfs pull`"
        raise DataError(f"{path} is cut or no safetensors file: {why}") from error

"""Weights that are there as pickles alone, as safetensors in the cache: converted once, by one
process of a machine, then read slice by slice like any others."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.data.digests import file_digest
from tram_ds.models import pickled, stored
from tram_ds.models.stored import Entry
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import first_line

VERSION = 1  # raise it when the conversion changes: it is part of the cache key
WAY_OUT = "load it with the library that wrote it, and write it by save_pretrained of transformers"
ALIKE = "alike.json"  # name -> the name under which the same values are, once


def entries(
    path: str, revision: str, cache_dir: str | os.PathLike[str] | None = None
) -> dict[str, Entry] | None:
    """As stored.entries, of the copy in safetensors of a folder or hub name that has pickles alone;
    None where it has none of these either. Makes the copy where there is none.

    The copy goes by the contents of the files, whose digests are remembered by size and time: a
    model that is copied elsewhere is not converted again. DataError as pickled.check, and where the
    cache has no room.
    """
    files = pickled.files(path, revision)
    if not files:
        return None
    try:
        parts = [(file.name, file_digest(file, cache_dir)) for file in files]
        target = cache_root(cache_dir) / "models" / digest_of(VERSION, *sum(parts, ()))
        build_once(target, lambda folder: _convert(path, files, folder, target), _valid)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"'{path}' cannot be made safetensors of in the cache ({first_line(error)}): make room "
            "there, give task.cache_dir (or TRAM_DS_CACHE) a folder on another disk, or give "
            "model.path the folder that save_pretrained of transformers wrote"
        ) from error
    return _entries(target)


def _entries(folder: Path) -> dict[str, Entry]:
    found = stored.entries(str(folder), "main") or {}
    alike = json.loads((folder / ALIKE).read_text(encoding="utf-8"))
    return found | {name: found[kept] for name, kept in alike.items()}


def _valid(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(_entries(folder))
    except (DataError, OSError, ValueError, KeyError):
        return False


def _convert(path: str, files: list[Path], folder: Path, target: Path) -> None:
    for file in files:
        pickled.look_into(file)  # all of them, before anything is written
    size = sum(file.stat().st_size for file in files)
    print(
        f"'{path}' has its weights as pickles alone ({files[0].name}): they are written once as "
        f"safetensors, {size / 1e6:,.1f} MB, into {target}",
        flush=True,
    )
    if shutil.disk_usage(folder).free < size:  # before it is filled for all who write there
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    placed: dict[str, str] = {}
    alike: dict[str, str] = {}
    for file in files:
        name = SAFE_WEIGHTS_NAME if len(files) == 1 else f"{file.stem}.safetensors"
        held = pickled.tensors(file)
        if odd := [n for n, t in held.items() if t.is_quantized or t.layout != torch.strided]:
            raise DataError(f"{file} holds {odd[0]} as what no safetensors file can: {WAY_OUT}")
        tensors, same = _apart(held)
        if twice := sorted((placed | alike).keys() & (tensors | same).keys()):
            raise DataError(f"'{path}' has {twice[0]} in {file.name} and in a file before it")
        try:
            save_file(tensors, folder / name, {"format": "pt"})
        except (KeyError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{file} holds what no safetensors file can ({first_line(error)}): {WAY_OUT}"
            ) from error
        placed |= dict.fromkeys(tensors, name)
        alike |= same
    if len(files) > 1:
        index = json.dumps({"metadata": {"total_size": size}, "weight_map": placed})
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index, encoding="utf-8")
    (folder / ALIKE).write_text(json.dumps(alike), encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors that share no memory, name -> the name of the one that it is): what is the same
    elements of the same memory, as tied weights are, is kept once, under the first name."""
    found: dict[str, Tensor] = {}
    alike: dict[str, str] = {}
    kept: dict[Any, str] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        # of the same memory another view is another tensor: a slice, or a transpose
        view = memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        if view in kept:
            alike[name] = kept[view]
            continue
        kept[view] = name
        whole = tensor.detach().contiguous()
        # save_file refuses tensors that share memory; what is empty shares none
        found[name] = whole.clone() if memory in seen and whole.numel() else whole
        seen.add(memory)
    return found, alike

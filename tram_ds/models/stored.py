"""The weights of a Hugging Face model where they are stored, read slice by slice by whoever holds
them.

A model that is larger than a host is built on the meta device; then every rank reads its own spans
from the safetensors files into the memory that trains. Which tensor of the files is which parameter
is transformers' to say (hub names without the base prefix, old names, ties): `read_model` hands its
loader stand-ins of one element each, and looks where they come out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from tram_ds.engines.shards import Shards, Span
from tram_ds.models.drawn import Drawn
from tram_ds.runtime.errors import DataError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# elements read at a time: 16 MiB of fp32, so that a rank never holds a whole embedding
CHUNK = 1 << 22


class NotSlices(Exception):
    """Why a model's parameters are not slices of its files: it has none that are read so, or
    transformers merges or splits their tensors."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the files. dtype: the file's own name of it, such as BF16."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Stored:
    """name of a parameter -> where its values are: in a file, or drawn when they are read (a fresh
    model); or, in `new`, whole in memory in fp32 (a new head)."""

    entries: Mapping[str, Entry | Drawn]
    new: Mapping[str, Tensor]
    opened: dict[Path, Any] = field(default_factory=dict, repr=False)

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Elements [start, start + len(into)) of the flattened parameter, cast to the dtype and
        put on the device of `into` (length,). No collective; host memory of one CHUNK, or of one
        row where that is longer, and of the whole parameter where it is drawn. DataError where the
        file ends early."""
        if name in self.new:
            into.copy_(self.new[name].detach().flatten()[start : start + into.numel()])
            return
        entry = self.entries[name]
        if isinstance(entry, Drawn):
            entry.read(start, into)
            return
        try:
            self._copy(entry, start, into)
        except (SafetensorError, OSError) as error:
            raise DataError(f"cannot read {entry.key} of {entry.file}: {error}") from error

    def _copy(self, entry: Entry, start: int, into: Tensor) -> None:
        stored = self._open(entry.file).get_slice(entry.key)
        if not entry.shape:
            into.copy_(stored[...].reshape(1))
            return
        per_row = max(1, torch.Size(entry.shape[1:]).numel())
        step, stop = max(1, CHUNK // per_row), start + into.numel()
        # whole rows: get_slice cuts the first dimension without reading the rest of the file
        for row in range(start // per_row, -(-stop // per_row), step):
            rows = stored[row : min(row + step, entry.shape[0])].reshape(-1)
            first = row * per_row
            low, high = max(start, first), min(stop, first + rows.numel())
            into[low - start : high - start].copy_(rows[low - first : high - first])

    def _open(self, file: Path) -> Any:
        if file not in self.opened:
            # kept open: a model's spans are read one by one, and a header is parsed at each opening
            self.opened[file] = safe_open(file, "pt")
        return self.opened[file]

    def follow(self, before: Mapping[int, str], module: nn.Module) -> None:
        """Parameters of `module` that have new names since, by id -> name `before`, are read under
        these; those that it has got since are in memory."""
        now = {name: before.get(id(p), "") for name, p in module.named_parameters()}
        found = {name: self.entries[was] for name, was in now.items() if was in self.entries}
        parameters = dict(module.named_parameters())
        self.new = {n: parameters[n].detach() for n in now if n not in found}
        self.entries = found

    def close(self) -> None:
        """Unmaps the files and forgets the new weights: nothing is read after this."""
        self.opened.clear()
        self.new = {}


def entries(path: str, revision: str) -> dict[str, Entry] | None:
    """Every tensor in the safetensors files of a folder or hub name, by its name there; None where
    it has no such files. Reads headers only. DataError names a file that is missing or broken."""
    found: dict[str, Entry] = {}
    for file, keys in _files(path, revision).items():
        try:
            with safe_open(file, "pt") as stored:
                there = set(stored.keys())
                for key in sorted(keys & there if keys else there):
                    part = stored.get_slice(key)
                    found[key] = Entry(file, key, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} is not whole ({error}): copy or download it again") from error
        if keys - there:
            lost = sorted(keys - there)
            raise DataError(
                f"{file} lacks {lost[0]} ({len(lost)} of the tensors that {SAFE_WEIGHTS_INDEX_NAME}"
                " says it has): copy or download the folder again"
            )
    return found or None


def _files(path: str, revision: str) -> dict[Path, set[str]]:
    """The files -> the names the index says each has (none said: all that are in it)."""
    single = find(path, SAFE_WEIGHTS_NAME, revision)
    if single is not None:
        return {single: set()}
    index = find(path, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        return {}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed = [(str(key), str(name)) for key, name in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{index} is not an index of weights ({error!r}): copy or download it again"
        ) from error
    files: dict[str, set[str]] = {}
    for key, name in placed:
        files.setdefault(name, set()).add(key)
    places = {name: find(path, name, revision) for name in sorted(files)}
    lost = [name for name, place in places.items() if place is None]
    if lost:
        raise DataError(
            f"'{path}' lacks {lost[0]} ({len(lost)} of the {len(files)} files that "
            f"{SAFE_WEIGHTS_INDEX_NAME} names): copy or download the folder again"
        )
    return {place: files[name] for name, place in places.items() if place is not None}


def find(path: str, name: str, revision: str) -> Path | None:
    """The file `name` of a folder or hub name, on this machine; None where it has none."""
    folder = Path(path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def read_model(
    kind: Any, files: Mapping[str, Entry], **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """(the model with its stored parameters on meta and `model.stored`, transformers' report).

    kind: the model's class, whose from_pretrained takes the `options`. files: as entries() gives
    them. What they lack is initialised by it, in memory, and buffers are read whole. NotSlices
    where a parameter is not one tensor of the files.
    """
    marks, state = _marked(files)
    model, report = kind.from_pretrained(
        None, state_dict=state, output_loading_info=True, **options
    )

    def behind(tensor: Tensor) -> Entry | None:
        _, entry = marks.get(tensor.untyped_storage().data_ptr(), (None, None))
        return entry

    absent = lacking(report)
    stored: dict[str, Entry] = {}
    new: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        entry = behind(parameter)
        if entry is not None and entry.shape == tuple(parameter.shape):
            stored[name] = entry
        elif entry is None and name in absent:
            new[name] = parameter.detach()  # keeps the fp32 values where an engine casts
        else:
            raise NotSlices(f"transformers converts its {name}")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and (entry := behind(buffer)) is not None:
                module._buffers[name] = _whole(entry).to(buffer.dtype)
    leave(model, stored, new)
    return model, report


def leave(model: Any, entries: Mapping[str, Entry | Drawn], new: Mapping[str, Tensor]) -> None:
    """The parameters of `entries` on meta, ties kept, and `model.stored`, which reads them."""
    _to_meta(model, entries)
    model.stored = Stored(entries, new)


def _marked(
    files: Mapping[str, Entry],
) -> tuple[dict[int, tuple[Tensor, Entry]], dict[str, Tensor]]:
    """(address -> the memory that is there, which has to be kept, and its entry; a state for
    from_pretrained).

    A tensor of floats is one element, seen as the whole: wherever the model puts it, its address
    says which of the files' it is. What is no float is a buffer, and read.
    """
    marks, state = {}, {}
    for key, entry in files.items():
        if entry.dtype in FLOATS:
            mark = torch.zeros(1)
            marks[mark.data_ptr()] = mark, entry
            # expand: the shape that transformers checks, in the memory of one element
            state[key] = mark.expand(entry.shape) if entry.shape else mark[0]
        else:
            state[key] = _whole(entry)
    return marks, state


Read = Callable[[str, int, Tensor], None]  # as Stored.read


def read_pieces(kind: Any, folder: Path, **options: Any) -> tuple[Any, Mapping[str, Any], Read]:
    """(a model of a folder, transformers' report, what reads its parameters): of one that is no
    slices of its files, from the whole in memory."""
    try:
        if (files := entries(str(folder), "main")) is None:
            raise NotSlices("it has no safetensors files")
        model, report = read_model(kind, files, **options)
        return model, report, model.stored.read
    except NotSlices:
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    whole = {name: p.detach().flatten() for name, p in model.named_parameters()}

    def read(name: str, start: int, into: Tensor) -> None:
        into.copy_(whole[name][start : start + into.numel()])

    return model, report, read


def laid_out_as(like: Shards, read: Read) -> Shards:
    """What `read` reads, in the layout, the dtypes and on the devices of `like`."""

    def piece(span: Span, like: Tensor) -> Tensor:
        into = torch.empty(span.length, dtype=like.dtype)
        read(span.name, span.start, into)
        return into.to(like.device).view(like.shape)

    return like.map(piece)


def _whole(entry: Entry) -> Tensor:
    with safe_open(entry.file, "pt") as stored:
        return stored.get_tensor(entry.key)


def lacking(report: Mapping[str, Any]) -> set[str]:
    """Parameters that transformers' loading report says are not, or not in this shape, in the
    files."""
    return {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}


def _to_meta(model: nn.Module, names: Container[str]) -> None:
    """Those parameters, ties kept: one parameter stays one."""
    empty = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
        for name, p in model.named_parameters()
        if name in names
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in empty:
                module._parameters[name] = empty[id(parameter)]

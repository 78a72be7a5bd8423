"""A rank's pieces of a checkpoint as safetensors files, written a few MiB at a time: no file is put
together in memory first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from tram_ds.models.stored import FLOATS

# of parameters and persistent buffers, as the safetensors format writes them
DTYPES = {kind: name for name, kind in FLOATS.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 1 << 22  # elements copied to the host at a time: 16 MiB of fp32


def header(entries: Mapping[str, Any]) -> bytes:
    """As https://huggingface.co/docs/safetensors has it: 8 bytes of length, JSON, blanks up to a
    multiple of 8."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    # the tensors begin after it, and are mapped into memory as they lie: aligned to 8 bytes
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def put(stream: BinaryIO, values: Tensor) -> None:
    """Its bytes; a flat tensor, contiguous, on the CPU."""
    # as bytes, because numpy has no bfloat16; .data is a view, so nothing is copied
    stream.write(values.view(torch.uint8).numpy().data)


class Piece(Protocol):
    """Flat elements of a tensor, and where they lie in it."""

    start: int

    @property
    def dtype(self) -> torch.dtype: ...
    def length(self) -> int: ...
    def chunks(self) -> Iterator[Tensor]:
        """Flat CPU tensors of at most CHUNK elements; laid end to end they are the piece."""
        ...


class PiecesWriter(StorageWriter):
    """Where torch's distributed checkpoint sends what its plan says is to be written.

    The files are those of its HuggingFaceStorageWriter with save_distributed, for its
    HuggingFaceStorageReader to read. That one holds every file twice while it makes it: as the
    library's buffer and as Python's bytes. files: key -> number of its file. rank: whose they are.
    """

    def __init__(
        self, folder: Path, pieces: Mapping[str, Piece], files: Mapping[str, int], rank: int
    ):
        self.folder, self.pieces, self.files, self.rank = folder, pieces, files, rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None, "the folder is given once"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # there is none: see reset

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        each: dict[int, list[WriteItem]] = {}
        for item in plan.items:
            # a file a kind: safetensors has all lengths at its beginning, so each is planned whole
            each.setdefault(self.files[item.index.fqn], []).append(item)
        for number, items in each.items():
            self._write(number, {item.index.fqn: self.pieces[item.index.fqn] for item in items})
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(item.index, _bytes(self.pieces[item.index.fqn]), None)
                for item in plan.items
            ]
        )
        return done

    def _write(self, number: int, pieces: Mapping[str, Piece]) -> None:
        end, entries = 0, {}
        # widest elements first, so that all are aligned
        order = sorted(pieces, key=lambda key: -pieces[key].dtype.itemsize)
        for key in order:
            piece, start = pieces[key], end
            end += _bytes(piece)
            entries[key] = {
                "dtype": DTYPES[piece.dtype],
                "shape": [piece.length()],
                "data_offsets": [start, end],
            }
        # where in its tensor a piece begins: HuggingFaceStorageReader asks under these keys
        offsets = {key: {"saved_offsets": [pieces[key].start]} for key in order}
        told = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        with (self.folder / self._name(number)).open("wb") as stream:
            stream.write(header({"__metadata__": told, **entries}))
            for key in order:
                for chunk in pieces[key].chunks():
                    put(stream, chunk)

    def _name(self, number: int) -> str:
        last = max(self.files.values())
        return f"{prefix(self.rank)}model-{number:05d}-of-{last:05d}.safetensors"

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass  # the manifest has it


def prefix(rank: int) -> str:
    """How the names of the files that `rank` writes begin."""
    return f"shard-{rank + 1:05d}-"


def _bytes(piece: Piece) -> int:
    return piece.length() * piece.dtype.itemsize

"""Flat shards of any layout through torch's distributed checkpoint and its safetensors storage:
nothing is pickled to disk.

A key is `theta/<name>`, `moment/<key>/<name>`, `reference/<key>/<name>` or `buffer/<name>`; its
tensor is the flattened parameter, of which each rank writes, or asks for, the elements [start,
start + length) that it holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tram_ds.checkpoint.pieces import CHUNK, PiecesWriter
from tram_ds.engines.reading import Reading
from tram_ds.engines.shards import Shards
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


Read = Callable[[int, int], Tensor]


class Flat(Tensor):
    """Elements [start, start + len(piece)) of a tensor of `numel`, as torch's planners ask for
    them."""

    piece: Tensor
    start: int
    read: Read | None

    @staticmethod
    def of(piece: Tensor, start: int, numel: int, read: Read | None = None) -> Flat:
        """read: how elements [from, to) of the piece are come by; None: they lie in it."""
        # the whole tensor's size without its memory: planners check sizes and read no element
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        flat: Flat = make(Flat, (numel,), dtype=piece.dtype)
        flat.piece, flat.start, flat.read = piece.detach(), start, read
        return flat

    def length(self) -> int:
        """Elements of the piece."""
        return self.piece.numel()

    def chunks(self) -> Iterator[Tensor]:
        """Flat CPU tensors of at most CHUNK elements; laid end to end they are the piece."""
        if self.read is None:  # a copy where it is not contiguous
            # no copy on the CPU, unlike read(): nobody changes it while it is written
            yield from (part.cpu() for part in self.piece.reshape(-1).split(CHUNK))
            return
        for start in range(0, self.length(), CHUNK):
            yield self.read(start, min(start + CHUNK, self.length()))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func}: a Flat only carries a piece to and from a checkpoint")

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.piece.numel()]))

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        data = TensorWriteData(
            self._chunk(), TensorProperties(dtype=self.piece.dtype), torch.Size(self.shape)
        )
        return [
            WriteItem(
                MetadataIndex(key, torch.Size([self.start])), WriteItemType.SHARD, tensor_data=data
            )
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        # view, not reshape: of a piece that is not contiguous that would fill a copy, in silence
        return self.piece.view(-1)  # to be filled


Flats = dict[str, Flat]


def flats(prefix: str, shards: Shards, reading: Reading | None = None) -> Flats:
    """This rank's pieces under `prefix`/<parameter>, empty ones left out. reading: where their
    values are found, if not in them."""
    found: Flats = {}
    for index, (span, piece) in enumerate(zip(shards.layout, shards, strict=True)):
        key = f"{prefix}/{span.name}"
        if key in found:
            raise CheckpointError(
                f"this rank holds two pieces of {span.name}: only one contiguous piece can be "
                "written"
            )
        if span.length:
            read = None if reading is None else partial(reading.read, index)
            found[key] = Flat.of(piece, span.start, torch.Size(span.shape).numel(), read)
    return found


def write(
    tensors: Flats, folder: Path, kinds: Iterable[str], names: Iterable[str], peers: Peers
) -> None:
    """Writes every rank's `tensors` into the folder, one file per kind and rank, a CHUNK at a
    time. Collective.

    kinds, names: all prefixes and all parameter names, the same on every rank. Refuses what does
    not add up to whole tensors.
    """
    # gone through once a kind, which an iterator would be for the first kind alone
    names = list(names)
    # numbered alike on all ranks, also for a rank that has nothing of a kind
    files = {f"{kind}/{name}": index for index, kind in enumerate(kinds, start=1) for name in names}
    dcp.save(
        tensors,
        storage_writer=PiecesWriter(folder, tensors, files, peers.rank),
        # no nested dicts and no ShardedTensors: nothing to flatten
        planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=peers.group,
        no_dist=peers.group is None,
    )


def read(tensors: Flats, path: Path, peers: Peers) -> None:
    """Fills the pieces in place from whatever shards lie in the folder. Collective."""
    dcp.load(
        tensors,
        storage_reader=dcp.HuggingFaceStorageReader(str(path)),
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=peers.group,
        no_dist=peers.group is None,
    )

"""Where every tensor of an export lies in Hugging Face's safetensors files: settled before anything
is written, so that all ranks write into the same files side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from tram_ds.checkpoint.pieces import CHUNK, DTYPES, header, put


@dataclass(frozen=True)
class Place:
    """Where one tensor's first element goes, and as what."""

    file: str
    byte: int
    dtype: torch.dtype

    def write(self, stream: BinaryIO, start: int, values: Tensor) -> None:
        """Elements [start, start + len(values)) of the flattened tensor, cast; a CHUNK at a
        time."""
        # past the end is allowed: the file system leaves a hole for what other ranks write
        stream.seek(self.byte + start * self.dtype.itemsize)
        for part in values.detach().reshape(-1).split(CHUNK):
            put(stream, part.to("cpu", self.dtype).contiguous())


@dataclass(frozen=True)
class Layout:
    """headers: file -> how it begins. index: of the files, None for a single one. places: by a
    tensor's name in the module."""

    headers: Mapping[str, bytes]
    index: str | None
    places: Mapping[str, Place]

    def begin(self, folder: Path) -> None:
        """The files without their tensors. Whatever is not written later is a hole, so every
        element must be."""
        for file, begins in self.headers.items():
            (folder / file).touch(mode=0o600)
            (folder / file).write_bytes(begins)
        if self.index is not None:
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(self.index)


def file_names(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Name in the module -> name in the files, of what of `state` is saved, as save_pretrained
    would; None where it would not save tensor by tensor: it merges or splits some (Mixtral's
    experts), or saves adapters alone, or is another library's."""
    if not isinstance(module, PreTrainedModel) or getattr(module, "_hf_peft_config_loaded", False):
        return None
    ignored = module._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    # by identity: what comes back as the same tensor was renamed alone, not merged or split
    names = {id(tensor): name for name, tensor in kept.items()}
    stored: Mapping[str, Any] = revert_weight_conversion(module, dict(kept))
    found = {names[id(t)]: name for name, t in stored.items() if id(t) in names}
    return found if len(found) == len(kept) == len(stored) else None


def laid_out(state: Mapping[str, Tensor], names: Mapping[str, str], max_shard_size: str) -> Layout:
    """state: meta tensors of the exported shapes and dtypes, by name in the module; names: as
    file_names gave them. Local, and the same on every rank."""
    mine = {there: here for here, there in names.items()}
    split = split_torch_state_dict_into_shards(
        {there: state[here] for there, here in mine.items()}, max_shard_size=max_shard_size
    )
    headers: dict[str, bytes] = {}
    places: dict[str, Place] = {}
    for file, held in split.filename_to_tensors.items():
        # widest elements first, so that all of a file's are aligned
        order = sorted(held, key=lambda there: -state[mine[there]].element_size())
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for there in order:
            tensor, start = state[mine[there]], end
            end += tensor.numel() * tensor.element_size()
            entries[there] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        headers[file] = begins = header(entries)
        for there in order:
            byte = len(begins) + entries[there]["data_offsets"][0]
            places[mine[there]] = Place(file, byte, state[mine[there]].dtype)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return Layout(headers, json.dumps(index, indent=2) if split.is_sharded else None, places)

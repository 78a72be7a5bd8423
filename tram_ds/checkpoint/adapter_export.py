"""The trained adapters of a model in peft's format, and the model with them in its weights: what
export.py is to weights that train whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from tram_ds.checkpoint.export import trained_state
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards, Span
from tram_ds.models import adapters
from tram_ds.runtime import run_folder
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.run_layout import ADAPTER, partial


def export_adapter(
    engine: Engine,
    folder: Path,
    peers: Peers,
    companion: Any = None,
    weights: Shards | None = None,
) -> None:
    """`folder` holds `adapter/`, of theta or of `weights`, for PeftModel.from_pretrained, and
    `companion` (tokenizer or image processor); replaced as a whole, or left as it was with
    CheckpointError on all ranks. In fp32. Collective."""
    state, incomplete = trained_state(engine, weights), partial(folder)

    def write() -> None:
        run_folder.discard_export(incomplete)
        adapters.save(engine.module, state, incomplete / ADAPTER)
        if companion is not None:
            companion.save_pretrained(incomplete)
        run_folder.replace_export(incomplete, folder)

    peers.first(f"writing {folder}", write)


def read_adapter(engine: Engine, folder: Path) -> Shards:
    """An export's adapters in the layout of params(). Each rank reads all of them; no
    collective."""
    values = adapters.read(engine.module, folder / ADAPTER)

    def piece(span: Span, like: Tensor) -> Tensor:
        flat = values[span.name].reshape(-1)[span.start : span.start + span.length]
        return flat.to(like.device, like.dtype).view(like.shape)

    return engine.params().map(piece)


def add_merged(
    folder: Path,
    base: nn.Module,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    companion: Any = None,
) -> None:
    """`folder`, an export of adapters, holds the whole model too, as export() would write it, and
    `companion` again. By one process, which has the whole model in memory. base: the model without
    adapters, in fp32; changed."""
    incomplete = partial(folder)
    run_folder.discard_export(incomplete)
    # a copy, not in place: replaced as a whole, so that a crash leaves the adapters alone
    shutil.copytree(folder, incomplete)
    disable_progress_bar()
    whole = adapters.merged(base, folder / ADAPTER).to(dtype)
    whole.save_pretrained(incomplete, max_shard_size=max_shard_size)
    if companion is not None:
        companion.save_pretrained(incomplete)
    run_folder.replace_export(incomplete, folder)

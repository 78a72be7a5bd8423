"""Writes the trained model in Hugging Face format: full fp32 weights, safetensors, ties kept,
reloads with from_pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards, Span
from tram_ds.runtime import run_folder
from tram_ds.runtime.run_layout import partial


def full_state(engine: Engine, shards: Shards | None = None) -> dict[str, Tensor]:
    """name -> whole parameter, fp32 on the CPU, on rank 0; {} elsewhere. Collective: one sum per
    parameter.

    shards: other weights in the layout of params(), such as an EMA; None means theta.
    """
    shards = engine.params() if shards is None else shards
    pieces: dict[str, list[tuple[Span, Tensor]]] = {}
    for span, piece in zip(shards.layout, shards, strict=True):
        pieces.setdefault(span.name, []).append((span, piece))
    state = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            frozen = engine.whole(parameter)
            if engine.rank == 0:
                state[name] = frozen.float().cpu()
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        full = _whole(engine, shape, pieces.get(name, []))
        if engine.rank == 0:
            state[name] = full.cpu()
    return state


def _whole(engine: Engine, shape: tuple[int, ...], pieces: list[tuple[Span, Tensor]]) -> Tensor:
    full = torch.zeros(torch.Size(shape).numel(), dtype=torch.float32, device=engine.device)
    for span, piece in pieces:
        full[span.start : span.start + span.length] = piece.detach().reshape(-1)
    if engine.shard_group is not None:
        dist.all_reduce(full, group=engine.shard_group)
    return full.view(shape)


def export(engine: Engine, folder: Path, companion: Any = None) -> None:
    """`folder` holds config, weights and `companion` (tokenizer or image processor); replaced as a
    whole. Collective."""
    state = full_state(engine)
    if engine.rank != 0:
        return
    incomplete = partial(folder)
    run_folder.discard_export(incomplete)
    module: Any = engine.module
    buffers = {k: v.detach().cpu() for k, v in module.named_buffers() if k in _persistent(module)}
    disable_progress_bar()
    module.save_pretrained(incomplete, state_dict={**state, **buffers}, safe_serialization=True)
    if companion is not None:
        companion.save_pretrained(incomplete)
    run_folder.replace_export(incomplete, folder)


def _persistent(module: torch.nn.Module) -> set[str]:
    """Names of buffers that belong to the state dict."""
    found = set()
    for prefix, m in module.named_modules():
        names = set(m._buffers) - m._non_persistent_buffers_set
        found |= {f"{prefix}.{name}" if prefix else name for name in names}
    return found


def read_export(engine: Engine, folder: Path) -> Shards:
    """Weights of an export in the layout of params(). Each rank reads the whole export once, on the
    CPU; no collective.

    Through from_pretrained, because the names in the file are not always those of the module's
    parameters.
    """
    kind: Any = next(
        c
        for c in type(engine.module).__mro__
        if hasattr(c, "from_pretrained") and "FSDP" not in c.__name__
    )
    weights = dict(kind.from_pretrained(folder, dtype=torch.float32).named_parameters())

    def piece(span: Span, like: Tensor) -> Tensor:
        flat = weights[span.name].detach().reshape(-1)[span.start : span.start + span.length]
        return flat.to(like.device, like.dtype).view(like.shape)

    return engine.params().map(piece)

"""Weights of a model that stands: those of a training checkpoint, or between two models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tram_ds.checkpoint import tensors as checkpoint_tensors
from tram_ds.checkpoint.manifest import verify
from tram_ds.checkpoint.state import buffers
from tram_ds.checkpoint.tensors import Flat
from tram_ds.engines.layout import parameter_names
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers


def fill(model: nn.Module, folder: Path) -> None:
    """The weights and buffers of a training checkpoint, in place. CheckpointError if it is damaged
    or of another model."""
    # before anything is read into the model: a damaged file would leave it half filled
    manifest = verify(folder)
    parameters = {name: p for p, name in parameter_names(model).items()}
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    saved = manifest["parameters"]
    differing = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
    if differing:
        raise CheckpointError(
            f"{folder} is of another model than the recipe's: {', '.join(differing[:5])} differ"
        )
    tensors = {f"theta/{name}": Flat.of(p.detach(), 0, p.numel()) for name, p in parameters.items()}
    tensors |= {f"buffer/{name}": Flat.of(b, 0, b.numel()) for name, b in buffers(model)}
    checkpoint_tensors.read(tensors, folder, Peers(1))


def towards(own: nn.Module, model: nn.Module, a: float, name: str) -> None:
    """`model` := (1 - a) own + a model, in place: every parameter once and every persistent buffer
    of real numbers; at 0 and 1 bit for bit one of the two. DataError where they differ in more than
    values.

    Weights that the pre-trained model lacks, such as a new head, are those that a run of the recipe
    starts from.
    """
    theirs, ours = (
        {**{n: p for p, n in parameter_names(m).items()}, **dict(buffers(m))} for m in (own, model)
    )
    differing = sorted(
        n
        for n in {*theirs, *ours}
        if n not in theirs or n not in ours or theirs[n].shape != ours[n].shape
    )
    if differing:
        raise DataError(
            f"'{name}' cannot be interpolated with the recipe's own model: "
            f"{', '.join(differing[:3])} differ in name or shape"
        )
    with torch.no_grad():
        for key, tensor in ours.items():
            # lerp takes tensors of one dtype
            start = theirs[key].to(tensor.dtype)
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(start, tensor, a))
            # counters such as BatchNorm's have no value between two: they are the model's, but at 0
            elif a == 0.0:
                tensor.copy_(start)

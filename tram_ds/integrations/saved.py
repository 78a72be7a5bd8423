"""What a step continues beside weights and optimizer, in a folder of somebody else's checkpoint:
the count of steps, which all masks follow from, and the reference weights (theta_{t-1}, theta_0,
the average).

One file where every rank holds whole weights; on shards a file of each rank's own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms.stepper import Stepper
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards, Span


def save(stepper: Stepper, folder: Path) -> None:
    """Writes this rank's file, if it has one, into `folder`, which is made."""
    from safetensors.torch import save_file

    engine, state = stepper.engine, stepper.state()
    if engine.shard_group is None and engine.rank:
        return
    pieces = {
        key(name, span): piece.detach().cpu().contiguous()
        for name, shards in state.references.items()
        for span, piece in zip(shards.layout, shards, strict=True)
    }
    told = json.dumps(about(stepper) | {"step": state.step, "base_steps": state.base_steps})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pieces, place(engine, folder), {"tram": told})


def load(stepper: Stepper, folder: Path) -> None:
    """Continues from what save() wrote; weights and optimizer are loaded already.

    ValueError where that was another algorithm, seed or sharding, or where nothing is there: the
    next step would silently measure d from other weights.
    """
    from safetensors import safe_open

    path = place(stepper.engine, folder)
    if not path.exists():
        raise ValueError(
            f"{folder} has no {path.name}, where the reference weights of a TRAM run on as many "
            "ranks would be: resume from a checkpoint of the same run, or start a new one with the "
            "model of this one (from_pretrained)"
        )
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["tram"])
        for name, now in about(stepper).items():
            if told[name] != now:
                raise ValueError(
                    f"{path} is of {name} {told[name]!r} and this run of {now!r}: resume with "
                    f"{told[name]!r}, or start a new run with the model of the checkpoint"
                )
        asked = [n for region in stepper.algorithm.regions for n in region.reference.names()]
        references = {name: _read(file, name, stepper.engine, path) for name in asked}
    stepper.load(
        replace(
            stepper.state(),
            step=told["step"],
            base_steps=told["base_steps"],
            references=references,
        )
    )


def about(stepper: Stepper) -> dict[str, Any]:
    """What a resumed run must have in common with the one that saved."""
    return {"algorithm": stepper.algorithm.name, "seed": stepper.seed}


def place(engine: Engine, folder: Path) -> Path:
    """The file that this rank reads."""
    if engine.shard_group is None:
        return folder / "tram.safetensors"
    return folder / f"tram-{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"


def key(reference: str, span: Span) -> str:
    """The name of a piece in its file."""
    return f"{reference}/{span.name}/{span.start}"


def _read(file: Any, name: str, engine: Engine, path: Path) -> Shards:
    there, like = set(file.keys()), engine.params()
    pieces: list[Tensor] = []
    for span, now in zip(like.layout, like, strict=True):
        if key(name, span) not in there:
            raise ValueError(
                f"{path} has no reference weights of {span.name}: the checkpoint is of another "
                "model, or of another number of ranks"
            )
        piece = file.get_tensor(key(name, span))
        if piece.numel() != now.numel():
            raise ValueError(
                f"{path} has {piece.numel()} reference weights of {span.name} for {now.numel()}: "
                "the checkpoint is of another model, or of another number of ranks"
            )
        pieces.append(torch.empty_like(now).copy_(piece.view(now.shape)))
    return Shards(pieces, like.layout)

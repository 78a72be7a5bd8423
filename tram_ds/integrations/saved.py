"""What a step continues beside weights and optimizer, in a folder of somebody else's checkpoint:
the count of steps, which all masks follow from, and the reference weights (theta_{t-1}, theta_0,
the average).

One file where every rank holds whole weights; on shards a file of each rank's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tram_ds.algorithms import references
from tram_ds.algorithms.stepper import State, Stepper
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards, Span
from tram_ds.integrations.record import record, refuse_unlike, unreadable
from tram_ds.integrations.same_run import about, differences
from tram_ds.runtime.peers import agreed

Made = Mapping[str, Any]  # an optimizer, as same_run.made() has it


def save(stepper: Stepper, folder: Path, optimizer: Made) -> None:
    """Writes this rank's file, if it has one, into `folder`, which is made. optimizer: as
    same_run.made() has it."""
    from safetensors.torch import save_file

    engine = stepper.engine
    if engine.shard_group is None and engine.rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pieces(stepper), place(engine, folder), {"tram": told(stepper, optimizer)})


def load(stepper: Stepper, folder: Path, optimizer: Made) -> None:
    """Continues from what save() wrote; weights and optimizer are loaded already. Collective.

    ValueError, on every rank, as continued() has it, or where a file is missing, damaged or of
    another step than the others: the next step would silently measure d from other weights.
    """
    path = place(stepper.engine, folder)
    _continue(stepper, lambda: _found(stepper, path, optimizer), str(path))


def _found(stepper: Stepper, path: Path, optimizer: Made) -> State:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise ValueError(
            f"{path.parent} has no {path.name}, where the reference weights of a TRAM run on as "
            "many ranks would be: resume from a checkpoint of the same run, or start a new one "
            "with the model of this one (from_pretrained)"
        )
    try:
        with safe_open(path, "pt") as file:
            there = set(file.keys())
            read = {name: file.get_tensor(name) for name in needed(stepper) if name in there}
            # None where it has none: of a file that something else wrote, or wrote anew
            told = (file.metadata() or {}).get("tram")
    except (SafetensorError, OSError) as error:
        raise unreadable(str(path), str(error)) from error
    return _state(stepper, told, read, str(path), optimizer)


def pieces(stepper: Stepper) -> dict[str, Tensor]:
    """This rank's pieces of the reference weights, live where they are on the CPU."""
    return {
        # save_file takes no strided view; of a channels-last weight this is a copy
        key(name, span): piece.detach().cpu().contiguous()
        for name, shards in stepper.state().references.items()
        for span, piece in zip(shards.layout, shards, strict=True)
    }


def told(stepper: Stepper, optimizer: Made) -> str:
    """Everything else, as JSON."""
    state = stepper.state()
    rest = {"step": state.step, "base_steps": state.base_steps, "radius": state.radius}
    return json.dumps(about(stepper, optimizer) | rest)


def continued(
    stepper: Stepper, told: Any, there: Mapping[str, Tensor], where: str, optimizer: Made
) -> None:
    """Continues from told() and pieces(); weights and optimizer are loaded already. Collective.

    ValueError, on every rank, where they are damaged, or of another run (same_run), model or
    sharding.
    """
    _continue(stepper, lambda: _state(stepper, told, there, where, optimizer), where)


def _continue(stepper: Stepper, read: Callable[[], State], where: str) -> None:
    world_size = stepper.engine.world_size
    # all ranks tell, also those that read theirs: one alone may have no file
    state = agreed(world_size, read)
    refuse_unlike((state.step, state.base_steps), where, world_size)
    stepper.load(state)


def _state(
    stepper: Stepper, told: Any, there: Mapping[str, Tensor], where: str, optimizer: Made
) -> State:
    then = record(told, where)
    if lines := differences(then.model_dump(exclude_unset=True), about(stepper, optimizer)):
        raise ValueError(
            f"{where} is of another run ({'; '.join(lines)}): resume with what that had, or start "
            "a new run with the model of the checkpoint"
        )
    # before the first step there was nothing to remember yet
    names = references.names(stepper.algorithm) if then.step else []
    weights = {name: _read(there, name, stepper.engine, where) for name in names}
    return replace(
        stepper.state(),
        step=then.step,
        base_steps=then.base_steps,
        references=weights,
        radius=then.radius,
    )


def needed(stepper: Stepper) -> list[str]:
    """The keys of pieces(), before there are any."""
    names = references.names(stepper.algorithm)
    return [key(name, span) for name in names for span in stepper.engine.layout]


def place(engine: Engine, folder: Path) -> Path:
    """The file that this rank reads."""
    if engine.shard_group is None:
        return folder / "tram.safetensors"
    return folder / f"tram-{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"


def key(reference: str, span: Span) -> str:
    """The name of a piece in its file."""
    return f"{reference}/{span.name}/{span.start}"


def _read(there: Mapping[str, Tensor], name: str, engine: Engine, where: str) -> Shards:
    like, found = engine.params(), []
    for span, now in zip(like.layout, like, strict=True):
        piece = there.get(key(name, span))
        if piece is None or piece.numel() != now.numel():
            raise ValueError(
                f"{where} has no reference weights of {span.name} {list(span.shape)}: the "
                "checkpoint is of another model, or of another number of ranks"
            )
        # in the live weights' memory order, dtype and device: steps go by flat views of both
        found.append(torch.empty_like(now).copy_(piece.view(now.shape)))
    return Shards(found, like.layout)

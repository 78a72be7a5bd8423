"""Between a stepper and a checkpoint: which tensors it has, what the manifest says of it, and
whether the two fit."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from tram_ds.algorithms import references
from tram_ds.algorithms.stepper import State, Stepper
from tram_ds.checkpoint.manifest import FORMAT, Manifest
from tram_ds.checkpoint.tensors import Flat, Flats, flats
from tram_ds.engines.optimizer_state import Extras, moment_names
from tram_ds.engines.protocol import Engine
from tram_ds.engines.reading import Reading
from tram_ds.engines.shards import Shards
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers

THETA = "theta"
LIBRARIES = ("torch", "deepspeed", "transformers", "safetensors", "numpy")


def refuse_displaced(stepper: Stepper) -> None:
    """CheckpointError inside engine.moved: its end would undo a load, and a checkpoint is never of
    theta + epsilon."""
    if stepper.engine.perturbed:
        raise CheckpointError(
            "the weights are displaced (inside engine.moved): save and load between steps, at theta"
        )


def refuse_unsettled(stepper: Stepper) -> None:
    """CheckpointError where a save would not be of the state between two steps: inside one, or
    after one that failed."""
    refuse_displaced(stepper)
    if stepper.unfinished:
        raise CheckpointError(
            f"step {stepper.steps + 1} did not finish: continue from the newest checkpoint instead"
        )


def collect(stepper: Stepper, reading: Reading | None = None) -> Flats:
    """This rank's live tensors to write: nothing where another rank writes the same.

    reading: of theta, where it is written while the next step begins. Of the rest a step changes
    buffers, which are copied for it, and what its descent changes.
    """
    state, found = stepper.state(), Flats()
    if stepper.engine.writes:
        for kind, shards in _kinds(state.params, state.moments, state.references):
            found |= flats(kind, shards, reading if kind == THETA else None)
    if stepper.engine.rank == 0:  # equal on all ranks
        found |= _buffer_flats(stepper.engine, copied=reading is not None)
        for path, tensor in state.extras.others.items():
            found[f"other/{path}"] = Flat.of(tensor, 0, tensor.numel())
    return found


def kinds(manifest: Manifest) -> list[str]:
    """The prefixes of all keys; each kind is a file of its own on every rank."""
    names = [f"moment/{key}" for key in manifest["moments"]] + [
        f"reference/{key}" for key in manifest["references"]
    ]
    return [THETA, *names, "buffer", *(["other"] if manifest.get("others") else [])]


def names(manifest: Manifest) -> list[str]:
    """What the prefixes of kinds() stand before."""
    return [*manifest["parameters"], *manifest["buffers"], *manifest.get("others", {})]


def describe(stepper: Stepper) -> Manifest:
    """The manifest but for files and parameters, which take all ranks."""
    state = stepper.state()
    return {
        "format": FORMAT,
        "step": state.step,
        "base_steps": state.base_steps,
        "seed": stepper.seed,
        "algorithm": stepper.algorithm.name,
        "moments": sorted(state.moments),
        "references": sorted(state.references),
        "radius": state.radius,
        "numbers": state.extras.numbers,
        "others": {path: list(t.shape) for path, t in state.extras.others.items()},
        "buffers": {name: list(b.shape) for name, b in buffers(stepper.engine.module)},
        "engine": type(stepper.engine.weights).__name__,
        "world_size": stepper.engine.world_size,
        "versions": _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def shapes(stepper: Stepper, peers: Peers) -> dict[str, list[int]]:
    """Every parameter's name and unsharded shape, from what all ranks hold. Collective."""
    mine = {span.name: list(span.shape) for span in stepper.engine.layout}
    # from all ranks: one alone may hold nothing of a parameter
    return dict(sorted(item for rank in peers.gather(mine) for item in rank.items()))


def buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers (batch-norm statistics): state that no shard holds and that is equal on
    all ranks."""
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set and buffer.numel():
                yield f"{path}.{name}" if path else name, buffer


def check(stepper: Stepper, manifest: Manifest, now: Mapping[str, list[int]]) -> None:
    """CheckpointError where the checkpoint is of another model, or lacks what the algorithm or the
    optimizer continues."""
    _same_tensors("parameters", manifest["parameters"], now)
    _same_tensors(
        "buffers",
        manifest["buffers"],
        {name: list(b.shape) for name, b in buffers(stepper.engine.module)},
    )
    needed = set(references.names(stepper.algorithm))
    missing = sorted(needed - set(manifest["references"]))
    # step 0 has no earlier weights yet: every row starts from theta_0 then
    if missing and manifest["step"]:
        raise CheckpointError(
            f"the reference weights {missing} that {stepper.algorithm.name} measures its distance "
            "from are not in this "
            f"checkpoint of {manifest['algorithm']}: without them the next step would silently "
            "take d = 0"
        )
    expected = moment_names(stepper.engine.weights.optimizer)
    # an optimizer has no moments before its first step
    if manifest["base_steps"] and expected is not None and expected != set(manifest["moments"]):
        raise CheckpointError(
            f"the optimizer continues from {sorted(expected) or 'no moments'}, the checkpoint "
            "holds "
            f"{manifest['moments'] or 'none'}: use the optimizer it was made with"
        )


def _same_tensors(what: str, then: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> None:
    problems = [f"{name} is not in the model" for name in then if name not in now]
    problems += [f"{name} is not in the checkpoint" for name in now if name not in then]
    both = then.keys() & now.keys()
    problems += [
        f"{n} is {then[n]} there and {now[n]} here"
        for n in sorted(both)
        if list(then[n]) != list(now[n])
    ]
    if problems:
        # a model of another size differs in each of its parameters
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the checkpoint is of another model: {what} differ: {'; '.join(problems[:5])}{more}"
        )


def empty(stepper: Stepper, manifest: Manifest) -> tuple[State, dict[str, Tensor], Flats]:
    """A State to be filled in this engine's layout, buffers to be filled, and the flats that share
    their memory."""
    like = stepper.engine.weights.masters()

    # contiguous: pieces are filled through flat views, and *_like keeps other strides
    def blank() -> Shards:
        return Shards(
            (torch.empty_like(p, memory_format=torch.contiguous_format) for p in like), like.layout
        )

    moments = {key: blank() for key in manifest["moments"]}
    # A reference that this algorithm has no use for is left where it is.
    used = references.names(stepper.algorithm)
    kept = {key: blank() for key in manifest["references"] if key in used}
    others = {p: torch.empty(shape) for p, shape in manifest.get("others", {}).items()}
    extras = Extras(manifest.get("numbers", {}), others)
    steps, seen = (manifest["step"], manifest["base_steps"]), manifest.get("radius")
    state = State(*steps, blank(), moments, kept, extras, seen)
    wanted: Flats = {f"other/{path}": Flat.of(t, 0, t.numel()) for path, t in others.items()}
    for kind, shards in _kinds(state.params, moments, kept):
        wanted |= flats(kind, shards)
    copies = {
        name: torch.empty_like(b, memory_format=torch.contiguous_format)
        for name, b in buffers(stepper.engine.module)
    }
    return (
        state,
        copies,
        wanted | {f"buffer/{n}": Flat.of(b, 0, b.numel()) for n, b in copies.items()},
    )


def apply(stepper: Stepper, state: State, copies: Mapping[str, Tensor]) -> None:
    """Continues from a filled state. Collective."""
    for name, buffer in buffers(stepper.engine.module):
        buffer.copy_(copies[name])
    stepper.load(state)


def _kinds(
    params: Shards, moments: Mapping[str, Shards], remembered: Mapping[str, Shards]
) -> list[tuple[str, Shards]]:
    pairs = [(f"moment/{key}", shards) for key, shards in moments.items()]
    return [
        (THETA, params),
        *pairs,
        *((f"reference/{key}", shards) for key, shards in remembered.items()),
    ]


def _buffer_flats(engine: Engine, copied: bool) -> Flats:
    return {
        f"buffer/{n}": Flat.of(b.detach().clone() if copied else b.detach(), 0, b.numel())
        for n, b in buffers(engine.module)
    }


def _versions() -> dict[str, str]:
    loaded: dict[str, Any] = {name: sys.modules.get(name) for name in LIBRARIES}
    return {"python": platform.python_version()} | {
        n: str(m.__version__) for n, m in loaded.items() if m is not None
    }

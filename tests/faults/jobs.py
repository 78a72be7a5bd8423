"""What the forked ranks of the checkpoint tests do; every function returns plain data on rank 0."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - imported before the fork
import torch
import torch.distributed as dist

from tests.parity import build, problem
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.stepper import Stepper
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.engines.shards import Shards

ADAMW = functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01)
GLOBAL_MICROS = 6  # divides over 1, 2 and 3 ranks
N = 2  # steps before and after a resume
RECIPE: dict[str, Any] = {
    "name": "toy",
    "train": {"steps": 9, "seed": 5, "micro_batch": 1},
    "optimizer": {"name": "adamw", "lr": 0.003},
}


def stepper(
    engine: str, name: str, world: int, dtype: str = "float32", micros: int = GLOBAL_MICROS
) -> Stepper:
    """A toy model with dropout under AdamW on `engine`."""
    model, options = problem.model(dropout=0.1), problem.OPTIONS.get(name, {})
    kind = getattr(torch, dtype)
    return build.stepper(
        engine, model, name, micros // world, optimizer=ADAMW, dtype=kind, **options
    )


def train(built: Stepper, steps: int, micros: int = GLOBAL_MICROS) -> list[float]:
    """Losses of both passes over `steps` more steps."""
    each = micros // built.engine.world_size
    first, losses = built.engine.rank * each, []
    for _ in range(steps):
        batches = [problem.batch(built.steps, j) for j in range(first, first + each)]
        report = built.step(batches, problem.forward, problem.counts)
        assert not report.skipped
        losses += [float(report.loss), float(report.distance), float(report.perturbed_loss)]
    return losses


def digest(built: Stepper) -> dict[str, str]:
    """sha256 of every whole tensor of the state, put together from all ranks: equal means
    bit-equal, whatever the layout."""
    state = built.state()
    kinds: dict[str, Shards] = {"theta": state.params}
    kinds |= {f"moment/{k}": v for k, v in state.moments.items()}
    kinds |= {f"reference/{k}": v for k, v in state.references.items()}
    mine = [
        (f"{kind}/{span.name}", span.start, piece.detach().reshape(-1).numpy().tobytes())
        for kind, shards in kinds.items()
        for span, piece in zip(shards.layout, shards, strict=True)
        if span.length and built.engine.writes
    ]
    everything: list[Any] = [mine]
    if built.engine.world_size > 1:
        everything = [None] * built.engine.world_size
        dist.all_gather_object(everything, mine)
    parts: dict[str, dict[int, bytes]] = {}
    for key, start, data in (item for rank in everything for item in rank):
        parts.setdefault(key, {})[start] = data
    whole = {key: b"".join(data for _, data in sorted(p.items())) for key, p in parts.items()}
    return {key: hashlib.sha256(data).hexdigest() for key, data in whole.items()} | {
        "steps": f"{state.step}/{state.base_steps}"
    }


@functools.cache
def trained() -> tuple[Stepper, dict[str, str]]:
    """A stepper at step 3; only loaded into."""
    built = stepper("single", "tram_prev", 1, micros=1)
    train(built, 3, 1)
    return built, digest(built)


def shared_folder(rank: int, world: int) -> Path:
    """A new folder, the same on all ranks."""
    box = [tempfile.mkdtemp() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(box)
    return Path(str(box[0]))


def save_in(folder: str, built: Stepper, **options: Any) -> None:
    with checkpoint.Saver(folder, built, **options) as saver:
        saver.save()


def renewed(built: Stepper, name: str, theta: Shards | None = None) -> Stepper:
    """A stepper of another algorithm on the same engine, from `theta` where given: building an
    engine is what takes long."""
    if theta is not None:
        built.engine.load(theta.clone(), {}, 0)
    return Stepper(built.engine, algorithm(name, **problem.OPTIONS.get(name, {})), problem.SEED)


def resume_is_bitwise(
    engine: str, dtype: str, micros: int, algorithms: list[str], n: int = N
) -> dict[str, Any]:
    """Per algorithm: what differs between 2 n steps and n + resume + n (nothing, if all is
    well)."""
    rank, world = build.start(engine)
    root, names = shared_folder(rank, world), algorithms or list(ALGORITHMS)
    straight = stepper(engine, names[0], world, dtype, micros)
    theta, runs = straight.engine.params().clone(), {}
    for name in names:
        built = renewed(straight, name, theta)
        train(built, n, micros)
        save_in(f"{root}/{name}", built)
        runs[name] = [digest(built), train(built, n, micros), digest(built)]
    build.stop(straight)

    # its weights and moments are those of the algorithm before
    second = stepper(engine, names[0], world, dtype, micros)
    found = {}
    for name in names:
        built = renewed(second, name)
        torch.manual_seed(rank)  # the global random state must not matter
        resumed = checkpoint.resume(built, f"{root}/{name}")
        assert resumed is not None and resumed.manifest["step"] == n
        again = [digest(built), train(built, n, micros), digest(built)]
        unequal = [
            what
            for what, then, now in zip(("load", "losses", "end"), runs[name], again, strict=True)
            if then != now
        ]
        found[name] = {"unequal": unequal, "tensors": len(again[0])}
    if rank == 0:
        shutil.rmtree(root)
    return found


def save_all(engine: str, root: str, algorithms: list[str]) -> dict[str, Any]:
    """Saves every algorithm after N steps under root/<algorithm>; digests at the save and the
    losses that follow."""
    _, world = build.start(engine)
    first = stepper(engine, algorithms[0], world)
    theta, found = first.engine.params().clone(), {}
    for name in algorithms:
        built = renewed(first, name, theta)
        train(built, N)
        save_in(f"{root}/{name}", built)
        found[name] = {"digest": digest(built), "losses": train(built, N)}
    return found


def load_all(engine: str, dtype: str, root: str, algorithms: list[str]) -> dict[str, Any]:
    """Loads every algorithm from root/<algorithm>; digests after the load and the losses that
    follow."""
    _, world = build.start(engine)
    first, found = stepper(engine, algorithms[0], world, dtype), {}
    for name in algorithms:
        built = renewed(first, name)
        assert checkpoint.resume(built, f"{root}/{name}") is not None
        found[name] = {"digest": digest(built), "losses": train(built, N)}
    return found

"""A save that writes while steps go on, slowed down so that they really run beside each other."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.faults.jobs import digest, renewed, shared_folder, stepper, train
from tests.parity import build
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.checkpoint import tensors
from tram_ds.engines.protocol import Engine
from tram_ds.engines.reading import Reading

FEW = 16  # elements read at a time


@contextmanager
def slowly(reads_theta: bool) -> Iterator[dict[str, int]]:
    """What is done meanwhile: parts of theta read before the weights first move, which waits for
    some, and after it; passes run; descents that came before the writing had ended."""
    seen = {"before": 0, "after": 0, "passes": 0, "early": 0}
    moved = False
    read, keep, close = Reading.read, Reading.keep, Reading.close
    backward, step = Engine.backward, Engine._after_reading

    def reads(self: Reading, *where: int) -> Any:
        time.sleep(0.002)
        seen["after" if moved else "before"] += 1
        return read(self, *where)

    def keeps(self: Reading, theta: Any) -> None:
        nonlocal moved
        while reads_theta and seen["before"] < 3:
            time.sleep(0.001)
        keep(self, theta)
        moved = True

    def passes(self: Engine, *rest: Any, **options: Any) -> Any:
        reading = self._reading
        if reading is not None and not reading._closed.is_set():
            seen["passes"] += 1
        return backward(self, *rest, **options)

    def waits(self: Engine) -> None:
        reading = self._reading
        step(self)
        seen["early"] += reading is not None and not reading._closed.is_set()

    def closes(self: Reading) -> None:
        time.sleep(0.2)  # of the disk
        close(self)

    with (
        mock.patch.object(tensors, "CHUNK", FEW),
        mock.patch.multiple(Reading, read=reads, keep=keeps, close=closes),
        mock.patch.multiple(Engine, backward=passes, _after_reading=waits),
    ):
        yield seen


def beside_the_steps(cases: list[list[str]]) -> list[dict[str, Any]]:
    """Per (engine, dtype, row): whether a background save's files are those of a save at once of
    the same state, byte for byte; what was done meanwhile; whether it can be gone on from."""
    rank, world = build.start("zero2")
    found = []
    for engine, dtype, name in cases:
        root = shared_folder(rank, world)
        built = stepper(engine, name, world, dtype)
        train(built, 2)
        with checkpoint.Saver(root / "at_once", built) as saver:
            at_once = saver.save()
        then = digest(built)
        with slowly(built.engine.writes) as seen, checkpoint.Saver(root / "beside", built) as saver:
            beside = saver.save(asynchronous=True)
            train(built, 2)
            saver.wait()
        one, other = (checkpoint.verify(path)["files"] for path in (at_once, beside))
        moved = digest(built) != then
        again = renewed(built, name)
        checkpoint.resume(again, root / "beside")
        equal = {"files": one == other, "state": digest(again) == then}
        found.append({**seen, **equal, "moved": moved, "separate": built.engine.weights.separate})
        build.stop(built)
        if rank == 0:
            shutil.rmtree(root)
    return found

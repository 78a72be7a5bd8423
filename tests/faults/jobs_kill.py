"""Ranks that die, or cannot write, in the middle of a save."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.faults.jobs import digest, save_in, shared_folder, stepper, train
from tests.parity import build
from tram_ds.algorithms.stepper import wrap
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.checkpoint.commits import candidates, folder
from tram_ds.checkpoint.export import export
from tram_ds.runtime import run_folder
from tram_ds.runtime import run_lock as lock
from tram_ds.runtime.exits import CheckpointError, PeerLost, RunLocked
from tram_ds.runtime.peers import Peers

EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")


def die_at(point: int | None, inside: Path) -> list[str]:
    """From now on: SIGKILL to this process just before its `point`-th change of a file under
    `inside`; None only counts."""
    seen: list[str] = []

    def reached(what: str) -> None:
        seen.append(what)
        if len(seen) - 1 == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or (
            event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
        path = str(arguments[0])
        # as rmtree calls it
        if path.startswith(str(inside)) or (event == "os.remove" and not os.path.isabs(path)):
            reached(f"{event} {Path(path).name}")

    fsync = os.fsync

    def watched(handle: Any) -> None:
        reached("fsync")
        fsync(handle)

    sys.addaudithook(hook)
    os.fsync = watched
    return seen


def in_child(action: Callable[[], None]) -> int:
    """Exit status of `action` in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_every_point(again: bool) -> dict[str, Any]:
    """kill -9 at each write, sync, rename and delete of a save that also retires an old commit.

    again: the save replaces a commit of its own step.
    """
    build.start("single")
    built, other = stepper("single", "tram_prev", 1), stepper("single", "tram_prev", 1)
    root = shared_folder(0, 1)
    before = root / "before"
    train(built, 1)
    save_in(str(before), built)
    states = {"old": digest(built)}
    train(built, 1)
    states["new"] = digest(built)
    if again:
        save_in(str(before), built, keep=1)

    def save(where: Path, point: int | None, report: Path | None = None) -> None:
        seen = die_at(point, folder(where))
        save_in(str(where), built, keep=1)
        if report:
            report.write_text("\n".join(seen))

    def trial(where: Path) -> Path:
        shutil.copytree(before, where)
        return where

    assert in_child(lambda: save(trial(root / "count"), None, root / "points")) == 0
    points = (root / "points").read_text().splitlines()
    found: dict[str, Any] = {"points": points, "old": 0, "new": 0, "wrong": []}
    for point, what in enumerate(points):
        where = trial(root / str(point))
        status = in_child(lambda where=where, point=point: save(where, point))
        if checkpoint.resume(other, where) is None or status != -signal.SIGKILL:
            found["wrong"].append([what, status])
            continue
        name = next((name for name, state in states.items() if state == digest(other)), "wrong")
        found[name] = found[name] + ([what] if name == "wrong" else 1)
        save_in(str(where), built, keep=1)  # the next start clears up, and can save
        checkpoint.resume(other, where)
        left = sorted(p.name for p in folder(where).iterdir())
        if digest(other) != states["new"] or left != ["latest", "step-00000002"]:
            found["wrong"].append([what, left])
        shutil.rmtree(where)
    shutil.rmtree(root)
    return found


def limited_file_size() -> dict[str, Any]:
    """Rank 1 of two cannot write a file as large as its shard: both ranks must say so and go on."""
    rank, world = build.start("fsdp2")
    root = shared_folder(rank, world)
    built = stepper("fsdp2", "tram_prev", world)
    train(built, 1)
    with checkpoint.Saver(root, built) as saver:
        saver.save()
        before = digest(built)
        train(built, 1)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        messages = []
        for asynchronous in (False, True):
            try:
                saver.save(asynchronous)
                saver.wait()
            except CheckpointError as error:
                messages.append(str(error))
        names = [None] * world
        dist.all_gather_object(names, messages)
        left = sorted(p.name for p in folder(root).iterdir())
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        checkpoint.resume(built, root)
        intact = digest(built) == before
        train(built, 1)
        saver.save()
    return {
        "messages": names,
        "left": left,
        "intact": intact,
        "after": [p.name for p in candidates(root)],
    }


def peer_killed() -> dict[str, Any]:
    """Rank 1 dies of SIGKILL while it writes: rank 0 must end soon, and the commit before must be
    whole."""
    rank, world = build.start("fsdp2")
    root = shared_folder(rank, world)
    built = stepper("fsdp2", "tram_prev", world)
    train(built, 1)
    saver = checkpoint.Saver(root, built, timeout=timedelta(seconds=20))
    saver.save()
    train(built, 1)
    if rank == 1:
        die_at(2, folder(root))
    start, message = time.monotonic(), ""
    try:
        saver.save()
    except PeerLost as error:
        message = str(error)
    manifest = checkpoint.verify(candidates(root)[0])
    left = sorted(p.name for p in folder(root).iterdir())
    return {
        "seconds": time.monotonic() - start,
        "message": message,
        "step": manifest["step"],
        "left": left,
    }


def lock_is_agreed() -> dict[str, Any]:
    """All ranks of a second job are turned away alike; a lock that was taken over stops the next
    save."""
    rank, world = build.start("ddp")
    root = shared_folder(rank, world)
    messages = []
    with lock.held(root, world) as mine:
        try:
            with lock.held(root, world):
                messages.append("in")
        except RunLocked as error:
            messages.append(str(error))
        saver = checkpoint.Saver(root, stepper("ddp", "sam", world), lock=mine)
        saver.save()
        if rank == 0:
            (root / "lock").write_text('{"token": "another", "host": "node7"}')
        try:
            saver.save()
        except CheckpointError as error:
            messages.append(str(error))
    with lock.held(root / "new", world):
        messages.append("in")
    box = [None] * world
    dist.all_gather_object(box, messages)
    return {"messages": box, "commits": [p.name for p in candidates(root)]}


def export_killed_at_every_point() -> dict[str, Any]:
    """Over an old export a new one, of other weights, each time killed one change of a file later:
    `old` and `new` count what stands then."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **fields))
    engine = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "base").engine
    root = shared_folder(0, 1)
    engine.load(engine.params().clone() * 0.0, {}, 0)

    def written() -> dict[str, bytes]:
        run_folder.restore_export(root / "export")
        return {p.name: p.read_bytes() for p in sorted((root / "export").iterdir())}

    def write() -> None:
        export(engine, root / "export", Peers(1), max_shard_size="20KB")

    write()
    old = written()
    engine.load(engine.params().clone() + 1.0, {}, 0)
    write()
    new, found = written(), {"old": 0, "new": 0, "wrong": [], "points": []}
    points = root / "points"

    def counted() -> None:
        seen = die_at(None, root)
        write()
        points.write_text("\n".join(seen))

    assert in_child(counted) == 0 and old != new
    found["points"] = points.read_text().splitlines()[:-1]
    for point in range(len(found["points"])):
        for path in root.glob("export*"):
            shutil.rmtree(path)
        (root / "export").mkdir()
        for name, data in old.items():
            (root / "export" / name).write_bytes(data)

        def killed(point: int = point) -> None:
            die_at(point, root)
            write()

        assert in_child(killed) == -signal.SIGKILL
        state = written()
        kind = {str(old): "old", str(new): "new"}.get(str(state))
        if kind is None:
            found["wrong"].append(found["points"][point])
        else:
            found[kind] += 1
    write()  # over what the last one left
    assert written() == new and sorted(p.name for p in root.glob("export*")) == ["export"]
    shutil.rmtree(root)
    return found

"""A lock that keeps two jobs out of one run folder, and outlives neither its job nor its node.

The lock is the file `<run_dir>/lock`: JSON that names its holder, its modification time the
holder's heartbeat. It comes into being whole (hard link of a finished file) and is only taken over
from a holder that is certainly dead (same host and process namespace, no such process) or that has
not touched it for `stale_after` seconds (other host, or a host that was rebooted).

NFS: creation by hard link is atomic there too, and ages are measured against the file server's
clock. What no file can exclude: a holder cut off from the server for longer than `stale_after`
that comes back. `check`, which a Saver calls before every save, ends it: it may have trained in
the meantime, but it does not save. Attribute caching may show a heartbeat up to a minute late: do
not set `stale_after` below two minutes on NFS.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tram_ds.runtime.exits import RunLocked
from tram_ds.runtime.files import remove_file
from tram_ds.runtime.locks import locked
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.run_layout import RunFolder

STALE_AFTER, BEAT = 120.0, 10.0


class RunLock:
    """Held from __enter__ to __exit__ by one process of the job (rank 0; the others learn of a
    failure from it).

    job: the scheduler's job id, SLURM_JOB_ID by default. A requeued job keeps its id: it waits for
    the heartbeat of its own killed predecessor on another node to lapse, where any other job is
    turned away with RunLocked at once.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        job: str | None = None,
        stale_after: float = STALE_AFTER,
        beat: float = BEAT,
    ):
        self.path = RunFolder(run_dir).lock
        self.stale_after, self.beat = stale_after, beat
        self.holder = {
            **_myself(),
            "job": job or os.environ.get("SLURM_JOB_ID"),
            "token": secrets.token_hex(8),
        }
        self._done, self._lost = threading.Event(), False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # as long as a predecessor's heartbeat may still count, and two beats that were under way
        deadline = time.monotonic() + self.stale_after + 2 * self.beat
        while (found := self._take()) is not None:
            again = self.holder["job"] is not None and found.get("job") == self.holder["job"]
            if not again or time.monotonic() > deadline:
                raise RunLocked(self._refusal(found))
            time.sleep(min(self.beat, 1.0))
        # daemon: a process that ends without __exit__ must not live on and keep its lock fresh
        self._thread = threading.Thread(target=self._heartbeat, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        # under the mutex: whoever looks at the lock meanwhile must not see it go between two looks,
        # and a job that took it over must not lose it to us. The folder may be gone with it
        with suppress(FileNotFoundError), locked(RunFolder(self.path.parent).lock_mutex):
            if _read(self.path).get("token") == self.holder["token"]:
                remove_file(self.path)

    def check(self) -> None:
        """RunLocked if another job has taken the lock over in the meantime: call it before writing
        to the folder."""
        if self._lost or _read(self.path).get("token") != self.holder["token"]:
            self._lost = True
            raise RunLocked(
                f"{self.path}: taken over by {_name(_read(self.path))}, which thought this job "
                "dead: ending here"
            )

    def _take(self) -> dict[str, Any] | None:
        """None once the lock is ours, otherwise its holder."""
        mine = self.path.with_name(f"{RunFolder.lock}.{self.holder['token']}")
        # whole before it is linked: nobody reads a lock without a name
        mine.write_text(json.dumps(self.holder))
        try:
            # two jobs that both find a stale lock must not both take it; without flock (some
            # mounts) a short race remains
            with locked(RunFolder(self.path.parent).lock_mutex):
                # twice: once to find it, once after a stale one is removed
                for _ in range(2):
                    try:
                        os.link(mine, self.path)
                        return None
                    except FileExistsError:
                        # our new file has the server's "now": two hosts' clocks may differ
                        found, age = _read(self.path), _age(self.path, mine)
                    if not self._dead(found, age):
                        return found | {"age": age}
                    remove_file(self.path)
                return _read(self.path)
        finally:
            remove_file(mine)

    def _dead(self, found: dict[str, Any], age: float) -> bool:
        here = all(found.get(key) == self.holder[key] for key in ("host", "boot", "namespace"))
        if here:
            # a pid alone may be another process's by now
            return _started(int(found["pid"])) != found["started"]
        return age > self.stale_after

    def _refusal(self, found: dict[str, Any]) -> str:
        here = found.get("host") == self.holder["host"]
        wait = (
            ""
            if here
            else f" (or wait: it is taken over {self.stale_after:.0f} s after the last heartbeat)"
        )
        return (
            f"{self.path.parent} is in use by {_name(found)}, last heartbeat "
            f"{found.get('age', 0):.0f} s ago: let that job end "
            f"or choose another run_dir{wait}; if you know that it is dead, delete {self.path}"
        )

    def _heartbeat(self) -> None:
        while not self._done.wait(self.beat):
            with suppress(OSError):
                if _read(self.path).get("token") == self.holder["token"]:
                    os.utime(self.path)
                else:
                    self._lost = True


@contextmanager
def held(run_dir: Path | str, world_size: int, **options: Any) -> Iterator[RunLock | None]:
    """The lock for a whole job: rank 0 holds it (the others get None), and all ranks raise
    RunLocked alike, or ValueError where there can be no lock. Collective.

    options: those of RunLock. Pass what this yields to Saver(lock=...), which checks it before
    every save.
    """
    peers, lock, text, unfit = Peers(world_size), None, "", ""
    if peers.rank == 0:
        lock = RunLock(run_dir, **options)
        try:
            lock.__enter__()
        except RunLocked as error:
            lock, text = None, f"{error}"
        except OSError as error:
            lock = None
            unfit = f"run_dir {run_dir}: cannot be made or written ({error}): choose another"
    # before anybody raises, or the other ranks would wait in this gather for a rank 0 that left
    text, unfit = peers.gather(text)[0], peers.gather(unfit)[0]
    peers.close()
    if unfit:
        raise ValueError(unfit)
    if text:
        raise RunLocked(text)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.__exit__()


def _myself() -> dict[str, Any]:
    """Who we are, precisely enough to tell whether the process still lives: pids are reused and
    containers share host names."""
    return {
        "host": socket.gethostname(),
        "boot": _file_text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link_text("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _started(pid: int) -> int:
    """When a process of this boot started, in clock ticks since then: no clock adjustment changes
    it. 0: no such process."""
    with suppress(OSError, ValueError, IndexError):
        # after the last ")": the name in brackets may hold blanks and brackets itself
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        # a zombie has ended, and only waits to be asked how
        return 0 if fields[0] in "ZX" else int(fields[19])
    return 0


def _name(holder: dict[str, Any]) -> str:
    if not holder.get("host"):
        return "a job that left no name"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder['host']}{job}, since {holder.get('since')}"


def _read(path: Path) -> dict[str, Any]:
    """The holder; {} for a missing or unreadable lock, whose age alone then counts."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _age(path: Path, fresh: Path) -> float:
    """Seconds since the last heartbeat, both times by the clock of whoever serves the files."""
    try:
        return os.stat(fresh).st_mtime - os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _file_text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link_text(path: str) -> str:
    with suppress(OSError):
        return os.readlink(path)
    return ""

"""The ranks of a job acting together on the CPU: every rank does its part, all learn of every
failure, all raise or none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from tram_ds.runtime.exits import CheckpointError, PeerLost

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # writing and hashing a large shard on slow storage takes minutes


class Peers:
    """A gloo group of its own, so a background thread may use it while training uses another.
    Building it is collective.

    Only one thread at a time may use it. world_size: 1 for an engine that trains alone, whatever
    the job around it.
    """

    def __init__(self, world_size: int, timeout: timedelta = TIMEOUT):
        self.world_size = world_size
        self.group: Any = (
            dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        )
        # 0 without a group: an engine that trains alone inside a larger job writes for itself
        self.rank = dist.get_rank() if world_size > 1 else 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Collective. PeerLost where a rank is
        gone or silent."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise PeerLost(
                f"rank {self.rank}: another rank died, or did not answer within the timeout"
            ) from error
        return values

    def every(self, doing: str, action: Callable[[], T]) -> T:
        """action() on every rank; its own result on each. Collective. If one failed, all raise
        CheckpointError."""
        result, failure = _tried(action)
        # also of a rank that failed: it must come to this gather, or the others wait for it
        texts = self.gather(_line(failure) if failure else None)
        failed = [
            t if t.startswith("rank ") else f"rank {rank}: {t}" for rank, t in enumerate(texts) if t
        ]
        if failed:
            raise CheckpointError(
                f"{doing} failed on {'; '.join(dict.fromkeys(failed))}"
            ) from failure
        return result  # type: ignore[return-value]

    def first(self, doing: str, action: Callable[[], T]) -> T:
        """action() on rank 0 alone; its result on every rank. Collective. If it failed, all raise
        CheckpointError."""
        # two collectives: the first says whether there is a result to send
        result = self.every(doing, action if self.rank == 0 else lambda: None)
        return self.gather(result)[0]  # type: ignore[return-value]

    def close(self) -> None:
        """Leaves the group. Collective; a peer that is gone is not waited for."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
            self.group = None


def agreed(world_size: int, action: Callable[[], T]) -> T:
    """action() on every rank; its own result on each. Collective.

    ValueError, on every rank with the words of the first that refused, where action() raised one on
    any: what each rank decides by its own file or batch is then decided for all. A rank on which it
    raised something else raises that, and the others name it.
    """
    result, failure = _tried(action)
    peers = Peers(world_size)
    try:
        texts = peers.gather(None if failure is None else _words(failure, peers.rank))
    finally:
        peers.close()
    if failure is not None and not isinstance(failure, ValueError):
        raise failure
    refused = [text for text in texts if text is not None]
    if refused:
        raise ValueError(refused[0]) from failure
    return result  # type: ignore[return-value]


def _tried(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What came of it, a failure of any kind too: this rank must come to the gather that follows,
    or the others wait for it."""
    try:
        return action(), None
    # named too, because torch's CheckpointException is a BaseException
    except (Exception, CheckpointException) as error:
        return None, error


def _words(error: BaseException, rank: int) -> str:
    return str(error) if isinstance(error, ValueError) else f"rank {rank}: {_line(error)}"


def _line(error: BaseException) -> str:
    """One line; torch's checkpoint error, which is raised on every rank, is unwrapped to the first
    that really failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_line(inner)}"
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"

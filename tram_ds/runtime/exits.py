"""Exit codes of every launch script, and the exceptions that end a run with one of them."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
USAGE: Final = 2  # the recipe or its data
NUMERIC: Final = 3
CHECKPOINT: Final = 4
LOCKED: Final = 5  # another job is in the run folder
PEER: Final = 6  # a rank died or hangs
REQUEUE: Final = 75  # stopped on request with a checkpoint: start it again


class NumericError(RuntimeError):
    """Training cannot go on: NaN or Inf again and again."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or trusted."""


class RunLocked(RuntimeError):
    """Another job holds the run folder."""


class PeerLost(RuntimeError):
    """Another rank died or does not answer."""


CODES: Final[dict[type[Exception], int]] = {
    NumericError: NUMERIC,
    CheckpointError: CHECKPOINT,
    RunLocked: LOCKED,
    PeerLost: PEER,
}


MEANING: Final = {
    USAGE: "recipe or data",
    NUMERIC: "numeric",
    CHECKPOINT: "checkpoint",
    LOCKED: "run folder in use",
    PEER: "peer lost or timeout",
    REQUEUE: "stopped to be requeued: start it again with --resume",
}


def code_of(error: BaseException) -> int | None:
    """The exit code that `error` ends a run with, None for one that deserves a traceback."""
    # isinstance, not the exact class: whatever derives from one ends with its code
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), None)

"""Training rows out of a stream: `buffer` of them at a time are shuffled among each other.

The stream's rows are those that its text is cut into, pass after pass. The first `buffer` rows of a
pass come in the order that (seed, 0) gives, the next ones in that of (seed, 1), and so on; what is
left at a pass's end is shuffled for itself. So a row's position is a function of the text, the
buffer and the seed alone: the same at any world size, and with a buffer for all rows the order of
tram_ds.data.order.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from tram_ds.data.order import batch_indices, epoch_permutation
from tram_ds.data.streamed import BEGINNING, Place, Tape
from tram_ds.runtime.errors import DataError

BYTES = 4  # of a token in memory
STEPS = 3  # steps whose rows are kept: one is taken while the next is read


@dataclass(frozen=True)
class State:
    """Where a stream's rows go on. position: rows before. number: of the next shuffle. taken: rows
    of this pass. row: sha256 of the row that comes next in the text, where it was read."""

    position: int = 0
    number: int = 0
    passes: int = 1
    taken: int = 0
    text: Place = BEGINNING
    row: str = ""


@dataclass(frozen=True)
class Shuffled:
    """Rows that were shuffled among each other: those from position state.position on."""

    state: State
    rows: np.ndarray  # (n, width) in the order of the text
    order: np.ndarray  # (n,) in which they come

    @property
    def end(self) -> int:
        return self.state.position + len(self.order)


@dataclass
class Filling:
    """Rows that are shuffled next, as far as they are read. state: before them. over: the pass has
    no more."""

    state: State
    rows: np.ndarray
    count: int = 0
    over: bool = False


class Stream:
    """Rows of a stream by position, from 0 without end, each behind `prefix`. Of the positions only
    the last few are held: those of STEPS global batches and what was shuffled with them; an earlier
    one is read again from the beginning. Threads may ask at once."""

    def __init__(
        self,
        tape: Callable[[Place], Tape],
        width: int,
        prefix: Sequence[int] = (),
        *,
        buffer: int,
        seed: int,
        global_batch: int,
        most: int | None = None,
        identity: str = "",
    ) -> None:
        """tape: the text's tokens from a place on. width: tokens of a row behind the prefix. most:
        rows of a pass. identity: of all that decides the rows, for a checkpoint. DataError where
        the text has no row."""
        self.open, self.width = tape, width
        self.prefix = np.asarray(prefix, dtype=np.int64)
        self.buffer, self.seed, self.most, self.identity = buffer, seed, most, identity
        self.kept = STEPS * global_batch
        self.lock = Lock()
        self.state, self.held = State(), deque[Shuffled]()
        self.filling: Filling | None = None
        if most == 0 or len(tape(BEGINNING).take(width)) < width:
            raise DataError(
                f"task.streaming: the training text has no row of {width + len(prefix)} tokens "
                "(task.seq_len): give more text or a smaller task.seq_len"
            )
        # a new one: from the other a row was taken, to see that there is one
        self.tape = tape(BEGINNING)

    def __getitem__(self, position: int) -> np.ndarray:
        """(seq_len,) int64."""
        with self.lock:
            found = self._at(position)
            if found is self.held[-1]:  # so that no step waits for a whole buffer
                self._fill(min(self.buffer, position - found.state.position + 1))
            tokens = found.rows[found.order[position - found.state.position]].astype(np.int64)
            while self.held and self.held[0].end <= position - self.kept:
                self.held.popleft()
        return np.concatenate([self.prefix, tokens]) if len(self.prefix) else tokens

    def said(self) -> str:
        """How the rows come, what they take of memory, and how far they were read."""
        most = (2 * self.buffer + self.kept) * self.width * BYTES / 1e6
        among = f"{self.buffer} rows shuffled at a time" if self.buffer > 1 else "in file order"
        times = f"{self.state.passes} pass{'es' * (self.state.passes != 1)} begun"
        return f"{among}, at most {most:.3g} MB of rows in memory on each rank, {times}"

    def kept_at(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps for a run whose next row is at this position."""
        with self.lock:
            # a save between two buffers: to say where the next begins nothing of it need be read
            unread = position == self.state.position
            state = self._next() if unread else self._at(position).state
        return {"stream": {"identity": self.identity, **asdict(state)}}

    def load(self, manifest: Mapping[str, Any]) -> None:
        """Goes on from kept_at() as a checkpoint kept it. One of another stream, or none, leaves
        this at its beginning: the rows are the same, but all before them are read."""
        found = dict(manifest.get("stream") or {})
        if found.pop("identity", None) != self.identity:
            return
        text = found.pop("text")
        # JSON made lists of them
        text["window"] = tuple(text["window"]) if text["window"] else None
        text["named"] = tuple(text["named"])
        with self.lock:
            self._go_to(State(**found, text=Place(**text)))

    def _at(self, position: int) -> Shuffled:
        first = self.held[0].state.position if self.held else self.state.position
        if position < first:
            self._go_to(State())
        while not self.held or self.held[-1].end <= position:
            self.held.append(self._read())
            while len(self.held) > 1 and self.held[0].end <= position - self.kept:
                self.held.popleft()
        return next(one for one in self.held if position < one.end)

    def _go_to(self, state: State) -> None:
        self.state, self.tape = state, self.open(state.text)
        self.held.clear()
        self.filling = None

    def _next(self) -> State:
        """Where the rows behind the held ones begin."""
        return self.filling.state if self.filling else self._here()

    def _here(self) -> State:
        return replace(self.state, text=self.tape.place())

    def _read(self) -> Shuffled:
        """The next rows that are shuffled among each other."""
        self._fill(self.buffer)
        filling = self.filling
        assert filling is not None
        before, rows, count = filling.state, filling.rows, filling.count
        # one row says whether the place in the text is still the one it was
        row = hashlib.sha256(rows[0].tobytes()).hexdigest()
        if before.row not in ("", row):
            raise DataError(
                "task.data is not what it was when the checkpoint was written: give the same "
                "files, or begin again in another run_dir"
            )
        order = epoch_permutation(self.seed, before.number, count)
        self.state = replace(
            self.state,
            position=before.position + count,
            number=before.number + 1,
            taken=self.state.taken + count,
            row="",
        )
        self.filling = None
        return Shuffled(replace(before, row=row), rows[:count], order)

    def _fill(self, wanted: int) -> None:
        """Reads on until `wanted` of the next buffer's rows are there, or all that a pass has."""
        if self.filling is None:
            # int32 holds any vocabulary's ids, in half of int64's memory
            rows = np.empty((self.buffer, self.width), dtype=np.int32)
            self.filling = Filling(self._here(), rows)
        filling = self.filling
        while filling.count < wanted and not filling.over:
            ended = self.state.taken + filling.count == self.most
            # take(0): the pass ends as it does where the text ends
            tokens = self.tape.take(0 if ended else self.width)
            if len(tokens) == self.width:
                filling.rows[filling.count] = tokens
                filling.count += 1
            elif filling.count:
                filling.over = True
            else:
                self._begin_again()

    def _begin_again(self) -> None:
        if self.state.taken == 0:
            raise DataError("task.data has no row left: its files were changed while they are read")
        self.tape = self.open(self.tape.again())
        self.state = replace(self.state, passes=self.state.passes + 1, taken=0)


Rows = Sequence[Any] | Stream  # what a run is trained on


def positions(rows: Rows, seed: int, step: int, global_batch: int) -> list[int]:
    """Which rows the global batch of `step` has: of a stream the next ones in its own order, else
    as data.order says."""
    if isinstance(rows, Stream):
        return list(range(step * global_batch, (step + 1) * global_batch))
    return batch_indices(seed, step, global_batch, len(rows))


def number_of(rows: Rows) -> int | None:
    """How many rows there are; None for a stream, of which nobody knows."""
    return None if isinstance(rows, Stream) else len(rows)

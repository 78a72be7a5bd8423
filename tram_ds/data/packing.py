"""Several short rows in one: which go together, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

from tram_ds.data.examples import Example, Examples


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Numbers of rows -> packs of at most `seq_len` tokens: the longest first, each into the
    fullest pack that has room for it (best-fit decreasing). A function of its arguments alone, so
    that a run that is resumed has the same packs.

    lengths: of every row, at most seq_len.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room -> packs that have so much left
    rooms: list[int] = []  # the keys of it, in order
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[row]
        # the least room that is enough
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, left = len(packs), seq_len - length
            packs.append([row])
        else:
            room = rooms[at]
            pack, left = open_packs[room].pop(), room - length
            packs[pack].append(row)
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        if left and left not in open_packs:
            insort(rooms, left)
        if left:
            open_packs.setdefault(left, []).append(pack)
    return packs


class Packs(Sequence[list[Example]]):
    """The rows of a split in packs of at most seq_len tokens, each a list of rows."""

    def __init__(self, rows: Examples, seq_len: int) -> None:
        self.rows = rows
        self.packs = best_fit(np.diff(rows.ends, prepend=0).tolist(), seq_len)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [self.rows[row] for row in self.packs[index]]

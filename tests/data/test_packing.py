"""Packs of rows: each row once, none too long, and the same whenever they are made."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tram_ds.data.packing import best_fit


@pytest.mark.parametrize(
    "lengths, packs",
    [
        ([5, 3, 2, 6], [[3, 2], [0, 1]]),  # 6 + 2 and 5 + 3 of 8
        ([8, 8], [[0], [1]]),
        # 4 fits beside 4 and beside 3: into the fuller pack
        ([4, 3, 5, 4], [[2, 1], [0, 3]]),
        ([1], [[0]]),
        ([], []),
    ],
)
def test_packs_by_hand(lengths: list[int], packs: list[list[int]]) -> None:
    assert best_fit(lengths, 8) == packs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60))
def test_every_row_once_and_no_pack_too_long(lengths: list[int]) -> None:
    packs = best_fit(lengths, 32)
    assert sorted(row for pack in packs for row in pack) == [*range(len(lengths))]
    sizes = [sum(lengths[row] for row in pack) for pack in packs]
    assert all(0 < size <= 32 for size in sizes)
    # of two packs that would fit into one, the later was opened although the earlier had room
    assert all(a + b > 32 for i, a in enumerate(sizes) for b in sizes[:i])
    assert best_fit(lengths, 32) == packs

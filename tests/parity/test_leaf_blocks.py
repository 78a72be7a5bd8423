"""ZeRO-3 gathers a block at once, which changes no bit of what a step does."""

from __future__ import annotations

from tests import ranks
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.table import ALGORITHMS


def test_blocks_as_one_give_the_same_masters() -> None:
    found = ranks.run("tests.parity.leaf_worker", world=2)
    assert found.keys() == {"tram_prev", "tram_x", "tram_init"}
    for row, (each, whole) in found.items():
        assert each == whole, row
        assert each[0] != each[1], "two shards"


def test_rows_with_a_gradient_through_their_reference_keep_the_hooks_of_every_module() -> None:
    """They run a block twice before its backward pass."""
    twice = {name for name in ALGORITHMS if algorithm(name).through_reference}
    assert twice == {"r3f", "asam_r3f"}

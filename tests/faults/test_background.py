"""A background save is of the step it was asked for at, on every engine, whatever runs beside
it."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.faults.forked import forked

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# Engines whose masters are the working copy, which every pass moves, and engines with masters
# apart; rows with a reference that the next step replaces, by theta and by an average of it.
CASES = [
    ("ddp", "float32", "asam_mesa"),
    ("fsdp2", "float32", "tram_prev"),
    ("fsdp2", "bfloat16", "asam_mesa"),
    ("zero0", "float32", "tram_prev"),
    ("zero1", "bfloat16", "tram_x"),
    ("zero2", "float32", "asam_mesa"),
    ("zero2", "bfloat16", "tram_prev"),
    ("zero3", "float32", "tram_prev"),
    ("zero3", "bfloat16", "tram_prev"),
    ("zero3_offload", "bfloat16", "tram_init"),
]


@functools.cache
def found() -> list[dict[str, Any]]:
    return forked([("beside_the_steps", 2, [CASES])])[0]


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_a_background_save_is_a_save_at_once_of_the_same_step(index: int) -> None:
    row = found()[index]
    assert row["files"] and row["state"], "sha256 of every file, and the state read back"
    assert row["moved"], "the steps beside it did something"
    # both passes of the first step; the descent, and with it the next step, came afterwards
    assert row["passes"] == 2 and row["early"] == 0
    if not row["separate"]:
        assert row["before"] > 0 and row["after"] > 0, "theta was read on both sides of a move"

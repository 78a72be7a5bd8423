"""Checkpoints carry a run over: bit for bit on the same engine, state bit-equal and losses close on
any other."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest

from tests.faults.forked import forked
from tram_ds.algorithms.table import ALGORITHMS

pytestmark = [pytest.mark.faults, pytest.mark.slow]

REFERENCED = ["trpo", "mesa", "asam_trpo", "asam_mesa", "tram_prev", "tram_init"]
SAME = [
    ("single", 1, "float32", 1, []),
    ("ddp", 2, "float32", 2, []),
    ("fsdp2", 2, "float32", 2, []),
    ("zero2", 2, "float32", 2, []),
    ("zero3", 2, "float32", 2, []),
    ("zero0", 2, "bfloat16", 2, ["tram_prev"]),  # from here on: other layouts in memory
    ("zero1", 2, "bfloat16", 2, ["asam_mesa"]),
    ("zero2", 2, "bfloat16", 2, ["tram_init"]),
    ("zero3_offload", 2, "float32", 2, ["tram_prev"]),
    ("fsdp2_offload", 2, "bfloat16", 2, ["asam_mesa"]),
    ("fsdp2_hybrid", 4, "float32", 4, ["tram_prev"]),
]
TARGETS = [
    ("fsdp2", 1, "float32"),
    ("ddp", 2, "float32"),
    ("zero1", 3, "float32"),
    ("single", 1, "float32"),
    ("zero0", 2, "float32"),
    ("fsdp2", 2, "bfloat16"),
]


@functools.cache
def resumed() -> list[dict[str, Any]]:
    jobs = [
        ("resume_is_bitwise", world, [e, dtype, micros, names])
        for e, world, dtype, micros, names in SAME
    ]
    return forked(jobs, timeout=600)


CASES = [(i, a) for i, (*_, names) in enumerate(SAME) for a in (names or ALGORITHMS)]


@pytest.mark.parametrize(
    ("index", "algorithm"), CASES, ids=[f"{SAME[i][0]}-{SAME[i][2]}-{a}" for i, a in CASES]
)
def test_2n_steps_equal_n_and_resume_and_n_bitwise(index: int, algorithm: str) -> None:
    row = resumed()[index][algorithm]
    assert row["unequal"] == []
    assert row["tensors"] > 3 * 26, "theta and two moments of every parameter were compared"


@functools.cache
def moved_over() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as root:
        jobs = [("save_all", 2, ["zero3", root, REFERENCED])]
        jobs += [
            ("load_all", world, [engine, dtype, root, REFERENCED])
            for engine, world, dtype in TARGETS
        ]
        saved, *loaded = forked(jobs, timeout=600)
    return saved, loaded


@pytest.mark.parametrize("algorithm", REFERENCED)
@pytest.mark.parametrize("index", range(len(TARGETS)), ids=[f"{e}x{w}-{d}" for e, w, d in TARGETS])
def test_zero3_on_two_ranks_continues_on_any_engine(index: int, algorithm: str) -> None:
    saved, loaded = moved_over()
    want, got = saved[algorithm], loaded[index][algorithm]
    assert got["digest"] == want["digest"]
    # a bf16 working copy is another forward pass
    tolerance = 1e-5 if TARGETS[index][2] == "float32" else 3e-2
    assert got["losses"] == pytest.approx(
        want["losses"], rel=tolerance, abs=1e-7 if tolerance < 1e-3 else 3e-2
    )

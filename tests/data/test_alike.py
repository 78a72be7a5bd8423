"""Two ranks whose folders and caches differ: both are told which rank reads what, and none begins
a collective that the other never joins."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run
from tram_ds.data.alike import read_alike
from tram_ds.runtime.errors import DataError

NODE = os.uname().nodename


def reads(case: str, rank: int) -> int:
    """What this rank finds where its node has another folder: rows, or an error."""
    if case == "missing" and rank == 1:
        raise DataError("task.data x is no folder")
    if case == "broken" and rank == 1:
        raise OSError("Input/output error")
    return 7 - rank if case == "fewer" else 7


def main(out: str, case: str) -> None:
    """One rank; rank 0 writes what each rank was told."""
    import torch.distributed as dist

    from tram_ds.runtime.ranks import detect, joined

    job = detect()
    with joined(job, "replicated"):
        try:
            rows = read_alike(
                lambda: reads(case, job.rank), lambda n: {"rows": n}, job.world_size, "task.data x"
            )
            told = f"read {rows}"
        except (ValueError, OSError, RuntimeError) as error:
            told = f"{type(error).__name__}: {error}"
        all_: list[Any] = [None] * job.world_size
        dist.all_gather_object(all_, told)
        if job.rank == 0:
            Path(out).write_text(json.dumps(all_))


OTHER = (
    f"DataError: task.data x is not the same on all ranks: rows 6 for rank 1 on {NODE}, 7 for rank "
    f"0 on {NODE}: put it where all nodes share it, or the same files on each"
)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("alike", ["read 7", "read 7"]),
        ("fewer", [OTHER, OTHER]),
        (
            "missing",
            [
                f"DataError: rank 1 on {NODE}: task.data x is no folder",
                "DataError: task.data x is no folder",
            ],
        ),
        (
            "broken",
            [f"PeerLost: rank 1 on {NODE}: Input/output error", "OSError: Input/output error"],
        ),
    ],
)
def test_all_ranks_are_told_of_the_one_that_differs(case: str, told: list[str]) -> None:
    assert run("tests.data.test_alike", case) == told


def test_one_process_reads_and_raises_as_it_is() -> None:
    assert read_alike(lambda: 7, lambda n: {"rows": n}, 1, "x") == 7
    with pytest.raises(ZeroDivisionError):
        read_alike(lambda: 1 // 0, lambda n: {"rows": n}, 1, "x")


if __name__ == "__main__":
    main(*sys.argv[1:])

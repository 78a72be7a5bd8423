"""`python -m tests.faults.forked OUT NAME ARGUMENTS`: the function NAME of tests.faults.jobs,
jobs_background or jobs_kill, its arguments and what it returns on rank 0 as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests import ranks
from tests.parity import build
from tram_ds.runtime.launchers import rank_variables

Job = tuple[str, int, list[Any]]  # (function of tests.faults.jobs, number of ranks, JSON arguments)


def forked(jobs: list[Job], timeout: float = 300) -> list[Any]:
    """The results of `jobs`, in order. A job called ..._killed kills its other ranks: only rank 0's
    end counts."""
    return [
        ranks.run(
            "tests.faults.forked",
            name,
            json.dumps(arguments),
            world=world,
            timeout=timeout,
            alone=name.endswith("_killed"),
        )
        for name, world, arguments in jobs
    ]


def main(out: str, name: str, arguments: str) -> None:
    from tests.faults import jobs, jobs_background, jobs_kill

    # one rank may join a group of its own
    os.environ |= rank_variables(0, 1, str(ranks.free_port())) if "RANK" not in os.environ else {}
    modules = (jobs, jobs_background, jobs_kill)
    action = next(getattr(module, name) for module in modules if hasattr(module, name))
    result = action(*json.loads(arguments))
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(result))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

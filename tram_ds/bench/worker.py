"""One engine measured by the ranks of one job: python -m tram_ds.bench.worker OUT ENGINE
WORK-AS-JSON ROUNDS [ROWS...]."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tram_ds.bench.contenders import OURS, Work, build_engine, missing_peers, ours, peers
from tram_ds.bench.measure import Shares, clock, counted, turns
from tram_ds.runtime.ranks import detect, joined

WARM_UP = 2


def measure(name: str, work: Work, rounds: int, rows: list[str]) -> dict[str, Any]:
    """Every contender on engine `name`: counts of one step each, then times of interleaved rounds.
    Collective."""
    job = detect()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with joined(job, "replicated" if name == "replicated" else "sharded"):
        engine = build_engine(name, work, job)
        batch = work.batch(job)
        parameters = sum(p.numel() for p in work.model().parameters())
        contenders = {row: lambda row=row: ours(row, engine, batch, work)[1]() for row in rows}
        contenders |= peers(name, engine, batch)
        counts = {
            label: _counts(label, rows, engine, batch, work, contenders) for label in contenders
        }
        times, shares = _times(rounds, rows, engine, batch, work, contenders)
        return {
            "engine": name,
            "world_size": job.world_size,
            "parameters": parameters,
            "tokens_per_rank": work.rows * work.tokens,
            "missing": missing_peers() if name in ("replicated", "ddp") else [],
            "counts": counts,
            "process_seconds": times,
            "overhead_seconds": shares,
        }


def _counts(
    label: str,
    rows: list[str],
    engine: Any,
    batch: Any,
    work: Work,
    contenders: dict[str, Callable],
) -> dict[str, Any]:
    step = ours(label, engine, batch, work)[1] if label in rows else contenders[label]
    for _ in range(WARM_UP):
        step()
    return vars(counted(step))


def _times(
    rounds: int,
    rows: list[str],
    engine: Any,
    batch: Any,
    work: Work,
    contenders: dict[str, Callable],
) -> Any:
    """(seconds per round, overhead seconds per round) of each contender, in an order that turns
    with the round.

    Of the process on a CPU; of the wall on a GPU, where the overhead, which would have to wait for
    every part, is left out.
    """
    steppers = {label: ours(label, engine, batch, work) for label in rows}
    times: dict[str, list[float]] = {label: [] for label in contenders}
    wall: dict[str, list[float]] = {label: [] for label in contenders}
    shares: dict[str, list[float]] = {label: [] for label in rows}
    for round_, label in turns(list(contenders), rounds):
        stepper, step = steppers.get(label, (None, contenders[label]))
        share = Shares(engine) if stepper is not None and engine.device.type == "cpu" else None
        start, wall_start = clock(engine.device), time.perf_counter()
        if share is None:
            step()
        else:
            with share.measuring():
                step()
        if round_:
            times[label].append(clock(engine.device) - start)
            wall[label].append(time.perf_counter() - wall_start)
        if round_ and share is not None:
            shares[label].append(share.seconds)
    return {"process": times, "wall": wall}, shares


def main(arguments: list[str]) -> None:
    """Rank 0 writes the measurement to OUT."""
    out, name, work, rounds, *rows = arguments
    # what is compared is the process's time, in which all its threads add up
    torch.set_num_threads(1)
    found = measure(name, Work(**json.loads(work)), int(rounds), rows or list(OURS))
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    # threads of DeepSpeed's and gloo's can abort the interpreter's own way out, after all is done
    os._exit(0)

"""`python -m tests.bench.peak_worker OUT TOKENS`: bytes alive at the top of a step, of each row
with logits in chunks and of a plain loop with whole ones, in one process at GPT-2's vocabulary."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.parity.build import leave
from tram_ds.bench.contenders import Work, build_engine, ours, peers
from tram_ds.bench.measure import Live
from tram_ds.bench.worker import WARM_UP
from tram_ds.runtime.ranks import detect, joined

ROWS = ("base", "sam", "tram_x", "tram_prev")


def peak(label: str, engine: Any, batch: Any, work: Work) -> int:
    """What a row keeps from step to step goes with its stepper."""
    row = label in ROWS
    step = ours(label, engine, batch, work)[1] if row else peers("replicated", engine, batch)[label]
    for _ in range(WARM_UP):
        step()
    with Live() as live:
        step()
    return live.peak


def main(out: str, tokens: str) -> None:
    torch.set_num_threads(1)
    job, work = detect(), Work("vocabulary", 1, int(tokens))
    with joined(job, "replicated"):
        engine, batch = build_engine("replicated", work, job), work.batch(job)
        found = {label: peak(label, engine, batch, work) for label in (*ROWS, "adamw")}
        Path(out).write_text(json.dumps(found))
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

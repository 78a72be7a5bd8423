"""`python -m tests.parity.analysis_worker OUT ENGINE`: every analysis of the toy GPT-2 on one
engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.parity import build, problem
from tram_ds.surface import cka, hessian, landscape, sharpness
from tram_ds.surface.subject import Subject, random_direction

ROWS = 13  # in micro-batches of 2: 7, so the second rank has one too few


def batch(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Rows of 5 to 9 tokens, padded to the longest of the micro-batch."""
    g = [torch.Generator().manual_seed(n) for n in numbers]
    rows = [
        torch.randint(0, 19, (5 + n % 5,), generator=h) for n, h in zip(numbers, g, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


def analyses(subject: Subject) -> dict[str, Any]:
    """Boxes and radii large enough that fp32 tells the losses apart; and the paper's box as it
    is."""
    theta = subject.engine.params(keep=True)
    other = theta + random_direction(subject.engine, 3, "pretrained") * 0.05
    wide = {"epsilon": 1e-2, "lr": 0.05, "batch": 4, "accumulation": 1}
    return {
        "sharpness": sharpness.measure(subject, sharpness.Options(**wide)),
        "juneja": sharpness.measure(subject, sharpness.Options(**wide, variant="juneja")),
        "paper": sharpness.measure(subject, sharpness.Options(batch=2, accumulation=2)),
        "cka_first": cka.measure(subject, other, cka.Options(), classification=True),
        "cka_mean": cka.measure(subject, other, cka.Options(centred=False), classification=False),
        "landscape": landscape.measure(
            subject, landscape.Options(points=5, plane_points=3, vectors="scaled", rows=6)
        ),
        "hessian": hessian.measure(subject, hessian.Options(rows=5, h=1e-2)),
    }


def main(out: str, engine: str) -> None:
    rank, _ = build.start(engine)
    torch.set_num_threads(1)
    built = build.stepper(engine, problem.model(dropout=0.1), "base", 1)
    subject = Subject(built.engine, problem.forward, batch, ROWS, 2, problem.SEED)
    before = built.engine.params().clone()
    found = analyses(subject)
    same = built.engine.params().equal(before) and before.equal(built.engine.working())
    found["changed"] = build.gather(float(not same))
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

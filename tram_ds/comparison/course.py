"""How a run went, from the records of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CURVE_POINTS = 100
RECORDED = ("seconds", "tokens", "loss", "validation_loss")  # what a course is made of


@dataclass(frozen=True)
class Course:
    """How a run went. seconds: of its training loop. tokens: counted targets of all steps. curve:
    (step, loss), of `kind` validation or training loss."""

    steps: int = 0
    seconds: float = math.nan
    tokens: float = math.nan
    kind: str = ""
    curve: tuple[tuple[int, float], ...] = ()


def course(records: Iterable[Mapping[str, Any]]) -> Course:
    """Totals and a loss curve of at most CURVE_POINTS points: validation loss where there is one,
    else means of the loss."""
    steps, seconds, loss, validation, targets = 0, 0.0, {}, {}, []
    for record in records:
        step = int(record["step"])
        steps, seconds = max(steps, step), seconds + float(record.get("seconds") or 0.0)
        if record.get("tokens") is not None:
            targets.append(float(record["tokens"]))
        if record.get("loss") is not None:
            loss[step] = float(record["loss"])
        if record.get("validation_loss") is not None:
            validation[step] = float(record["validation_loss"])
    points, kind = (
        (sorted(validation.items()), "validation")
        if validation
        else (sorted(loss.items()), "training")
    )
    # or 1: without points the width would be 0, which range() refuses as a step
    width = -(-len(points) // CURVE_POINTS) or 1
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    curve = tuple((b[-1][0], math.fsum(v for _, v in b) / len(b)) for b in bins)
    # of the steps that were logged, as many each
    tokens = steps * math.fsum(targets) / len(targets) if targets else math.nan
    return Course(steps, seconds or math.nan, tokens, kind, curve)

"""Score against compute: what a method's training takes, and what it gains for that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tram_ds.algorithms.cost import cost
from tram_ds.comparison.blocks import Block, Cell, number
from tram_ds.comparison.collect import Table
from tram_ds.comparison.run import Run

SHORTEST = 60.0  # seconds of training: start-up and noise decide what a shorter run gains an hour


def examples(run: Run) -> float:
    """Compute of a run's training, in examples (or blocks of tokens) of plain training: TRAM's
    count 7/3 each."""
    return samples(run) * cost(run.recipe["algorithm"]).relative


def compute(table: Table, baseline: str) -> Block:
    """What a method's training takes in epochs, tokens, passes, FLOP and hours, its gain per each,
    and the loss at equal compute.

    Gain: over the pre-trained model, or over the baseline where nobody measured that; relative, in
    percent, for perplexities, in points for accuracies.
    """
    means, layout = table.means()[table.layout.summary], table.layout
    start = "pretrained" if "pretrained" in means.index else baseline
    total = {m: sum(examples(run) for run in runs) / len(runs) for m, runs in table.runs.items()}
    # the pre-trained model may be the baseline, and spent nothing that could be divided by
    unit = total.get(baseline) or next(iter(total.values())) or math.nan
    every = [run for runs in table.runs.values() for run in runs]
    budget = min(examples(run) for run in every)
    rows = []
    for method, runs in table.runs.items():
        gain = (means[method] - means[start]) * layout.gain
        gain = 100 * gain / means[start] if layout.lower_is_better else gain
        score = number(float(means[method]), max(2, layout.digits))
        spent, gains = _spent(runs, total[method] / unit), _gains(runs, gain, total[method] / unit)
        rows.append((method, [*spent, score, *gains, number(_loss_at(runs, budget), 4)]))
    hours = "GPU hours" if all(run.on_gpu for run in every) else "rank hours"
    columns = ("epochs", "tokens", "passes", "FLOP", hours, layout.summary)
    columns += ("gain", "gain / FLOP", "gain / hour", "loss, equal FLOP")
    return Block(
        "compute",
        f"{layout.title}: score against compute",
        columns,
        rows,
        _notes(every, table, start, baseline),
    )


def _notes(every: Sequence[Run], table: Table, start: str, baseline: str) -> tuple[str, ...]:
    kind = next((run.course.kind for run in every if run.course.kind), "training")
    over = "the pre-trained model" if start == "pretrained" else start
    # not <: a run without records has NaN seconds, and is brief too
    brief = [run for run in every if not run.course.seconds >= SHORTEST]
    return (
        f"gain over {over}, in {'percent' if table.layout.lower_is_better else 'points'}; FLOP "
        f"relative to {baseline}, from the passes "
        "of a step (forward / backward, where a backward costs two forwards and R3F "
        "differentiates both of its branches)",
        f"last column: in-domain {kind} loss where each run has spent as much as the cheapest run "
        "in all",
        *(("no gain / hour of methods with runs of less than a minute",) if brief else ()),
    )


def samples(run: Run) -> int:
    """Examples, or blocks of tokens, that a run trained on."""
    return run.course.steps * run.recipe["train"]["global_batch"]


def _spent(runs: Sequence[Run], relative: float) -> list[Cell]:
    """Epochs, tokens, passes, FLOP and hours."""
    step = cost(runs[0].recipe["algorithm"])
    passed = [samples(run) / run.train_rows if run.train_rows else math.nan for run in runs]
    return [
        number(float(np.mean(passed)), 2),
        token_count(float(np.mean([run.course.tokens for run in runs]))),
        Cell(f"{step.forward:g} / {step.backward:g}", step.units),
        number(relative, 2),
        number(_hours(runs), 3),
    ]


def token_count(count: float) -> Cell:
    """As papers print it: 320, 1.6 M, 2.0 B."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return Cell(f"{count / unit:.1f}{name}", count)
    return number(count, 0)


def _gains(runs: Sequence[Run], gain: float, relative: float) -> list[Cell]:
    """The gain in all, per FLOP and per hour."""
    long = all(run.course.seconds >= SHORTEST for run in runs)
    per = (1.0, relative or math.nan, _hours(runs) if long else math.nan)
    return [number(gain / each, 2, sign=True) for each in per]


def _hours(runs: Sequence[Run]) -> float:
    return float(np.mean([run.course.seconds * run.ranks / 3600 for run in runs]))


def _loss_at(runs: Sequence[Run], budget: float) -> float:
    """The mean over seeds of the loss where `budget` was spent, between the points of the curve;
    NaN outside it."""
    found = []
    for run in runs:
        x = along(run)
        # the cheapest run's budget is its own last point, but for the rounding of step * per_step
        inside = bool(x) and x[0] <= budget <= x[-1] * (1 + 1e-9)
        found.append(
            float(np.interp(budget, x, [loss for _, loss in run.course.curve]))
            if inside
            else math.nan
        )
    return float(np.mean(found)) if found else math.nan


def along(run: Run) -> list[float]:
    """The compute spent at every point of a run's curve, in examples of plain training."""
    # a run that is read without its records has 0 steps
    per_step = examples(run) / max(run.course.steps, 1)
    return [step * per_step for step, _ in run.course.curve]

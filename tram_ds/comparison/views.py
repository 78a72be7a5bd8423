"""Further blocks: what a score costs, and how zero-shot scores follow the training domain (Table 9,
Figure 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tram_ds.algorithms.cost import cost
from tram_ds.comparison import correlation, paper
from tram_ds.comparison.blocks import Block, Cell, number
from tram_ds.comparison.collect import Table
from tram_ds.comparison.correlation import ENOUGH, Panel, Trend
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.paper import Frame
from tram_ds.comparison.runs import Run
from tram_ds.comparison.tables import recomputed

SPLITS = {"m2d2_s2orc": "s2orc", "m2d2_wiki": "wiki"}  # table -> its part of Table 9


def examples(run: Run) -> float:
    """Compute of a run's training, in examples (or blocks of tokens) of plain training: TRAM's
    count 7/3 each."""
    return (
        run.course.steps
        * run.recipe["train"]["global_batch"]
        * cost(run.recipe["algorithm"]).relative
    )


def compute(table: Table, baseline: str) -> Block:
    """Score against compute: passes, FLOP and hours, the gain per each, and the loss at equal
    compute.

    Gain: over the pre-trained model, or over the baseline where nobody measured that; relative, in
    percent, for perplexities, in points for accuracies.
    """
    means, layout = table.means()[table.layout.summary], table.layout
    start = means["pretrained"] if "pretrained" in means.index else means[baseline]
    total = {m: sum(examples(run) for run in runs) / len(runs) for m, runs in table.runs.items()}
    unit = total.get(baseline) or next(iter(total.values())) or math.nan
    budget = min(examples(run) for runs in table.runs.values() for run in runs)
    rows = []
    for method, runs in table.runs.items():
        step = cost(runs[0].recipe["algorithm"])
        hours = float(np.mean([run.course.seconds * run.ranks / 3600 for run in runs]))
        gain = (means[method] - start) * layout.gain
        gain = 100 * gain / start if layout.lower_is_better else gain
        relative = total[method] / unit
        cells = [
            Cell(f"{step.forward:g} / {step.backward:g}", step.units),
            number(relative, 2),
            number(hours, 3),
        ]
        cells += [number(float(means[method]), max(2, layout.digits)), number(gain, 2, sign=True)]
        cells += [
            number(gain / relative if relative else math.nan, 2, sign=True),
            number(gain / hours, 2, sign=True),
        ]
        rows.append((method, [*cells, number(_loss_at(runs, budget), 4)]))
    kind = next(
        (run.course.kind for runs in table.runs.values() for run in runs if run.course.kind),
        "training",
    )
    per = (
        "passes",
        "FLOP",
        "rank hours",
        layout.summary,
        "gain",
        "gain / FLOP",
        "gain / hour",
        "loss, equal FLOP",
    )
    over = "the pre-trained model" if "pretrained" in means.index else baseline
    notes = (
        f"gain over {over}, in {'percent' if layout.lower_is_better else 'points'}; FLOP relative "
        f"to {baseline}, from the passes "
        "of a step (forward / backward, where a backward costs two forwards and R3F "
        "differentiates both of its branches)",
        f"last column: in-domain {kind} loss where each run has spent as much as the cheapest run "
        "in all",
    )
    return Block("compute", f"{layout.title}: score against compute", per, rows, notes)


def _loss_at(runs: Sequence[Run], budget: float) -> float:
    """The mean over seeds of the loss where `budget` was spent, between the points of the curve;
    NaN outside it."""
    found = []
    for run in runs:
        per_step = examples(run) / max(run.course.steps, 1)
        x = [step * per_step for step, _ in run.course.curve]
        inside = bool(x) and x[0] <= budget <= x[-1] * (1 + 1e-9)
        found.append(
            float(np.interp(budget, x, [loss for _, loss in run.course.curve]))
            if inside
            else math.nan
        )
    return float(np.mean(found)) if found else math.nan


def correlations(means: Frame, layout: Layout) -> Block:
    """Table 9: Pearson's rho of every domain with the training domain over methods, beside the
    paper's where it has one."""
    title = f"{layout.title}: correlation with {layout.train}"
    if (there := len(correlation.compared(list(means.index)))) < ENOUGH:
        return Block(
            "correlation",
            title,
            ("rho",),
            [],
            (f"not enough methods ({there}; {ENOUGH} needed)",),
            corner="domain",
        )
    found = correlation.table(means, layout)
    theirs = paper.correlations(SPLITS[layout.name]) if layout.name in SPLITS else None
    rows = []
    for domain, (rho, p, n) in found.iterrows():
        enough = Cell(str(int(n)), n) if n >= ENOUGH else Cell(f"{int(n)}: not enough methods", n)
        cells = [
            number(rho, 3, sign=True),
            Cell("yes" if p < 0.01 else "no" if math.isfinite(p) else "-", p),
            enough,
        ]
        if theirs is not None and domain in theirs.index:
            cells += [number(float(theirs.loc[str(domain), "pearson_to_train"]), 3, sign=True)]
        elif theirs is not None:
            cells += [Cell("-")]
        rows.append((str(domain), cells))
    columns = ("rho", "p < 0.01", "methods", *(("paper",) if theirs is not None else ()))
    notes = ("over methods, without the pre-trained model and the ASAM combinations",)
    return Block("correlation", title, columns, rows, notes, corner="domain")


def trends(panels: Sequence[Panel], layout: Layout) -> Block:
    """The lines of Figure 2, of earlier methods and of TRAM, and how far TRAM lies below the
    earlier methods' line."""
    rows = []
    for shown in panels:
        lines = [
            number(v, 3, sign=True) for t in (shown.earlier, shown.tram) for v in (t.slope, t.rho)
        ]
        counts = Cell(f"{shown.earlier.n} / {shown.tram.n}{_few(shown.earlier)}")
        rows.append((shown.title, [counts, *lines, number(shown.tram_below, 2, sign=True)]))
    columns = (
        "methods",
        "slope, earlier",
        "rho, earlier",
        "slope, TRAM",
        "rho, TRAM",
        "TRAM below the line",
    )
    notes = (f"x: {layout.train}, y: the panel's {layout.metric}; a line needs {ENOUGH} methods",)
    return Block(
        "trends",
        f"{layout.title}: zero-shot against {layout.train}",
        columns,
        rows,
        notes,
        corner="panel",
    )


def _few(line: Trend) -> str:
    return " (not enough methods)" if line.n < ENOUGH else ""


def averages(layout: Layout) -> Block:
    """The paper's zero-shot averages and what its columns give."""
    again = recomputed(layout)
    rows = [
        (
            str(method),
            [
                number(printed, 1),
                number(ours, 2),
                Cell("" if abs(printed - ours) < 0.0501 else "differs"),
            ],
        )
        for method, printed, ours in zip(
            again.index, again["printed"], again["recomputed"], strict=True
        )
    ]
    return Block(
        "averages", f"the paper's averages: {layout.title}", ("printed", "recomputed", ""), rows
    )

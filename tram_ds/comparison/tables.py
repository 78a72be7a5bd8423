"""The blocks of a comparison: scores and their spread, the paper's figures and the difference,
and the summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePath

import numpy as np
import pandas as pd

from tram_ds.comparison import paper, separable
from tram_ds.comparison import significance as tests
from tram_ds.comparison.blocks import NONE, Block, Cell, as_printed, number, with_spread
from tram_ds.comparison.collect import Table, with_summary
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.paper import Column, Frame

SINGLE = 5  # tables of at most so many columns print mean and spread in one cell


def scores(table: Table) -> Block:
    """Means over seeds, best and worst of each column marked where seeds tell them apart; the
    pre-trained model is not in the contest."""
    layout, means = table.layout, table.means()
    spread = table.values.groupby(level="method").std()
    columns = tuple(means.columns)
    in_cell = len(columns) <= SINGLE and bool(spread.notna().any(axis=None))
    rows = []
    for method in means.index:
        cells = [number(float(means.loc[method, c]), layout.digits) for c in columns]
        if in_cell and method in spread.index:
            cells = [
                with_spread(c, float(spread.loc[method, n]), layout.digits)
                for c, n in zip(cells, columns, strict=True)
            ]
        rows.append((method, _with_n(cells, table, method)))
    counts = _counts(table)
    few, most = int(counts[counts > 0].min().min()), int(counts.max().max())
    seeds = f"{few}" if few == most else f"{few} to {most}"
    rows, untold = separable.marked(rows, columns, table)
    notes = (
        f"mean over {seeds} seed{'s' * (seeds != '1')}{', ± standard deviation' * in_cell}",
        *untold,
        *_without_number(table),
        *table.notes,
    )
    missing = f"{layout.summary} needs every column" if means[layout.summary].isna().any() else ""
    return Block(
        "scores",
        layout.title,
        columns,
        rows,
        (*notes, missing) if missing else notes,
        legend=separable.LEGEND,
    )


def _counts(table: Table) -> Frame:
    """method -> how many seeds have a number, per column."""
    return table.values.groupby(level="method").count()


def _with_n(cells: list[Cell], table: Table, method: str) -> list[Cell]:
    """n beside the means of fewer seeds than the method has."""
    if method not in table.runs:
        return cells
    found, seeds = _counts(table).loc[method], len(table.of(method))
    return [
        replace(cell, text=f"{cell.text} (n = {n})") if 0 < n < seeds else cell
        for cell, n in zip(cells, found.tolist(), strict=True)
    ]


def _without_number(table: Table) -> list[str]:
    """Which run lacks which number that another seed of its method has."""
    counts, notes = _counts(table), []
    for (method, seed), row in table.values.drop(columns=table.layout.summary).iterrows():
        lacking = [c for c in row.index if math.isnan(row[c]) and counts.loc[method, c] > 0]
        if lacking:
            notes.append(f"no number: {method}, seed {seed}, in {', '.join(lacking)}")
    return notes


def spread(table: Table) -> list[Block]:
    """Standard deviation over seeds and half the 95 % t interval of the mean, per column; none
    where no method has two seeds."""
    grouped = table.values.groupby(level="method")
    several = [m for m in table.methods if len(table.of(m)) > 1]
    if not several:
        return []
    digits, columns = max(2, table.layout.digits), tuple(table.values.columns)

    def deviation(values: Column) -> Cell:
        return number(float(values.std()), digits)

    def around(values: Column) -> Cell:
        found = values.dropna().tolist()
        if table.layout.log:
            return _interval(tests.mean_interval(found, log=True), digits)
        return number(tests.t_half_width(found), digits)

    kinds: dict[str, tuple[str, Callable[[Column], Cell]]] = {
        "std": ("standard deviation over seeds", deviation),
        "ci95": (
            "95 % t interval of the geometric mean, on the log scale"
            if table.layout.log
            else "half the width of the 95 % t interval of the mean",
            around,
        ),
    }
    blocks = []
    for name, (title, measure) in kinds.items():
        rows = [(m, [measure(grouped.get_group(m)[c]) for c in columns]) for m in several]
        blocks.append(Block(name, f"{table.layout.title}: {title}", columns, rows))
    return blocks


def _interval(found: tests.Interval, digits: int) -> Cell:
    """[low, high]; a dash where there is none. value: the upper bound."""
    if not math.isfinite(found.low):
        return Cell(NONE)
    return Cell(f"[{found.low:.{digits}f}, {found.high:.{digits}f}]", found.high)


def printed(layout: Layout, columns: Sequence[str] | None = None) -> Block:
    """The paper's own table, or these columns of it."""
    assert layout.paper is not None
    shown = list(dict.fromkeys(c for c in (columns or layout.paper.columns) if c in layout.paper))
    around = paper.spread(layout.name) if len(shown) <= SINGLE else None
    rows = []
    for method, values in layout.paper[shown].iterrows():
        cells = [number(float(v), layout.digits) for v in values]
        if around is not None:
            widths = around.loc[str(method)].reindex(shown).tolist()
            cells = [
                with_spread(cell, width, layout.digits)
                for cell, width in zip(cells, widths, strict=True)
            ]
        rows.append((str(method), cells))
    notes = ("± 95 % interval",) if around is not None else ()
    return Block(
        "paper",
        f"the paper: {layout.title}",
        tuple(shown),
        as_printed(rows, layout),
        notes,
        legend="best and worst of each column as printed: the paper gives no seeds",
    )


def recomputed(layout: Layout) -> Frame:
    """method -> printed and recomputed zero-shot average of the paper's table. ValueError where it
    prints none."""
    if layout.paper is None or layout.train is None or len(layout.domains) < 2:
        raise ValueError(f"{layout.name}: the paper prints no average that could be recomputed")
    again = layout.paper[list(layout.zero_shot)].mean(axis=1)
    return pd.DataFrame({"printed": layout.paper["zs_avg"], "recomputed": again})


def _other_models(table: Table) -> tuple[str, ...]:
    """A note where runs are of another model than the paper's rows, by its name."""
    wanted = paper.MODELS.get(table.layout.name)
    models = {
        str(run.recipe["model"].get("path") or "a new model")
        for runs in table.runs.values()
        for run in runs
    }
    others = sorted(name for name in models if PurePath(name).name != wanted)
    if wanted is None or not others:
        return ()
    return (f"the paper's model is {wanted}; runs here are of {', '.join(others)}",)


def against_paper(table: Table) -> Block | None:
    """Ours minus the paper's. The average is compared over the columns that ours has."""
    layout, means = table.layout, table.means()
    if layout.paper is None:
        return None
    theirs = layout.paper.rename(columns={"zs_avg": layout.summary})
    columns = [c for c in means.columns if c in theirs]
    complete = set(layout.zero_shot) <= set(means.columns)
    notes = ()
    if layout.summary not in theirs or (not complete and len(layout.domains) > 1):
        # both averages over the same columns: the printed one is over all of the paper's
        theirs = with_summary(layout.paper[[c for c in columns if c != layout.summary]], layout)
        columns = [*(c for c in columns if c != layout.summary), layout.summary]
        notes = (
            f"{layout.summary} of both over the {sum(c in layout.zero_shot for c in columns)} "
            "domains that are here",
        )
    notes += _other_models(table)
    methods = [m for m in means.index if m in theirs.index]
    rows = [
        (
            m,
            [
                number(float(means.loc[m, c] - theirs.loc[m, c]), layout.digits, sign=True)
                for c in columns
            ],
        )
        for m in methods
    ]
    better = "negative" if layout.lower_is_better else "positive"
    return (
        Block(
            "difference",
            "ours minus the paper",
            tuple(columns),
            rows,
            (f"{better} is better", *notes),
        )
        if rows
        else None
    )


def summary(table: Table) -> Block:
    """In-domain, out-of-domain with its interval, the worst domain and the gap, per method."""
    layout = table.layout
    rows = []
    for method in table.means().index:
        values = (
            table.pretrained.to_frame().T
            if method == "pretrained" and table.pretrained is not None
            else table.of(method)
        )
        rows.append((method, _summarised(values, layout)))
    trained = layout.train is not None
    average = "out-of-domain" if trained else "average"
    names = (
        "seeds",
        "in-domain",
        average,
        "geometric",
        "95 % interval",
        "worst domain",
        "worst",
        "gap",
    )
    hidden = {*(() if trained else ("in-domain", "gap")), *(() if layout.log else ("geometric",))}
    shown = [i for i, name in enumerate(names) if name not in hidden]
    columns = tuple(names[i] for i in shown)
    kept = [(m, [cells[i] for i in shown]) for m, cells in rows]
    told = ["mean ± standard deviation over seeds; t interval over seeds"]
    told += ["gap = in-domain's lead over out-of-domain"] if trained else []
    told += (
        [
            f"{average}: the paper's arithmetic mean; geometric: over domains and seeds; the "
            "interval is that of the geometric mean over seeds, on the log scale"
        ]
        if layout.log
        else []
    )
    notes = ("; ".join(told),)
    return Block("summary", f"{layout.title}: summary", columns, kept, notes)


def _summarised(values: Frame, layout: Layout) -> list[Cell]:
    counted, digits = values[layout.summary].dropna().tolist(), layout.digits
    n, mean = len(counted), values.mean()
    found = tests.mean_interval(counted, layout.log)
    every = values[[c for c in values if c in layout.zero_shot]].dropna().to_numpy()
    geometric = float(np.exp(np.log(every).mean())) if layout.log and every.size else math.nan
    outside = mean[[c for c in values if c in layout.zero_shot]].dropna() * layout.gain
    worst = str(outside.idxmin()) if len(outside) else NONE
    around = values.std() if n > 1 else mean * math.nan
    inside = float(mean[layout.train]) if layout.train in mean else math.nan
    average = float(mean[layout.summary])
    return [
        Cell(str(n) if n == len(values) else f"{n} of {len(values)}", n),
        with_spread(
            number(inside, digits), float(around.get(layout.train or "", math.nan)), digits
        ),
        with_spread(number(average, digits), float(around[layout.summary]), digits),
        number(geometric, digits),
        _interval(found, digits),
        Cell(worst),
        number(float(mean[worst]) if len(outside) else math.nan, digits),
        number((inside - average) * layout.gain, digits),
    ]

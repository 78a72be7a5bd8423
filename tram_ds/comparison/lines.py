"""Every row off the line that the other rows make, in-domain against zero-shot, as far as one
number a row goes: for tables without runs, such as the paper's, and beside a frontier of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from tram_ds.comparison.blocks import Block, Cell, number
from tram_ds.comparison.correlation import ENOUGH, compared, is_tram
from tram_ds.comparison.frontier import Scale
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.paper import Frame
from tram_ds.comparison.residual import line


def off_lines(
    means: Frame, layout: Layout, marks: Mapping[str, str] | None = None, notes: Sequence[str] = ()
) -> list[Block]:
    """Two blocks: each row's zero-shot average off the line through the earlier methods without
    this one, with t; and the same by domain. None where fewer than three of these are left, or the
    table has no training domain. marks: row -> what stands beside it, with its notes."""
    there = compared([str(m) for m in means.index])
    earlier = [m for m in there if not is_tram(m)]
    domains = [d for d in layout.zero_shot if d in means]
    # <=: an earlier row is held against the others, which are one fewer
    if len(earlier) <= ENOUGH or layout.train not in means or not domains:
        return []
    shown = {c: _off(means, layout, c, there, earlier) for c in (layout.summary, *domains)}
    rows = []
    for method in there:
        found, t = shown[layout.summary][method]
        scores = [float(means.loc[method, c]) for c in (layout.train, layout.summary)]
        cells = [*(number(v, layout.digits) for v in scores), found, number(t, 1, sign=True)]
        rows.append((method, cells + ([Cell(marks.get(method, ""))] if marks else [])))
    columns = ("in-domain", layout.summary, "off the line", "t", *(("marks",) if marks else ()))
    told = _told(layout, len(earlier))
    title = f"{layout.title}: off the line of the other rows"
    by_domain = [(m, [shown[d][m][0] for d in domains]) for m in there]
    meanings = {d: f"off that line on {d}, {_unit(layout)}" for d in domains}
    return [
        Block("line", title, columns, rows, (*told, *notes)),
        Block("line_domains", f"{title}, by domain", tuple(domains), by_domain, meanings=meanings),
    ]


def _off(
    means: Frame, layout: Layout, column: str, methods: Sequence[str], earlier: Sequence[str]
) -> dict[str, tuple[Cell, float]]:
    """Row -> (how far off, t of the same sign)."""
    scale = Scale(layout.log)
    x, y = (
        dict(zip(means.index, scale.up(means[c].to_numpy(float)), strict=True))
        for c in (layout.train, column)
    )
    found = {}
    for method in methods:
        others = [m for m in earlier if m != method and math.isfinite(x[m] + y[m])]
        off, t = line(
            np.array([x[m] for m in others]),
            np.array([y[m] for m in others]),
            x[method],
            y[method],
        )
        found[method] = in_unit(off, y[method] - off, scale), t * -layout.gain
    return found


def in_unit(residual: float, level: float, scale: Scale, digits: int = 1) -> Cell:
    """A residual as people read it: 100 x the difference of logarithms, in percent; or points of
    accuracy at the level where it is."""
    if not math.isfinite(residual):
        return number(math.nan, 1)
    ends = scale.down(np.array([level + residual, level]))
    shown = 100 * residual if scale.log else float(ends[0] - ends[1])
    return Cell(f"{shown:+z.{digits}f}{' %' * scale.log}", shown)


def _unit(layout: Layout) -> str:
    return "in percent: negative is better" if layout.log else "in points: positive is better"


def _told(layout: Layout, n: int) -> tuple[str, ...]:
    """Of a method that the line is not made with: all n make it."""
    what = "log perplexity" if layout.log else "logit of the error"
    edge = stats.t.ppf(0.975, n - 2)
    return (
        f"least squares of zero-shot on in-domain {what} over the {n} rows that are no TRAM row, "
        f"without the row itself; off it {_unit(layout)}",
        f"t: of a prediction; 5 % of rows on the line are beyond {edge:.2f} ({n} rows); one number "
        "a row, so methods stand for noise, not seeds",
    )

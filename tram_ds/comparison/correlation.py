"""How scores outside the training domain follow the score on it, over methods: Table 9 and Figure
2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from tram_ds.comparison import paper
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.paper import Frame

# the S2ORC domains near to the training domain
STEM = tuple(paper.correlations("s2orc").query("stem == 1").index)
ENOUGH = 3  # methods


@dataclass(frozen=True)
class Trend:
    """A line through points. n: how many; with fewer than three, or without spread, all else is
    NaN."""

    n: int
    slope: float = math.nan
    intercept: float = math.nan
    rho: float = math.nan
    p: float = math.nan

    def at(self, x: float) -> float:
        return self.slope * x + self.intercept


@dataclass(frozen=True)
class Panel:
    """One panel of Figure 2: a domain or a group's average against the training domain.

    tram_below: by how much the TRAM points lie under the line of the earlier methods, on average.
    """

    title: str
    points: Frame  # method -> x, y
    earlier: Trend
    tram: Trend
    tram_below: float


def is_tram(method: str) -> bool:
    """Is this row a TRAM variant?"""
    return method.startswith("tram_")


def compared(methods: Sequence[str]) -> list[str]:
    """The rows Table 9 and Figure 2 are about: neither the pre-trained model nor ASAM combined with
    a penalty."""
    return [m for m in methods if m != "pretrained" and not m.startswith("asam_")]


def trend(x: Sequence[float], y: Sequence[float]) -> Trend:
    """Least squares and Pearson's rho with its p value. Pairs with a NaN are left out."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    kept = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[kept], ys[kept]
    # scipy raises where all x are equal, and has no rho where all y are
    if len(xs) < ENOUGH or np.ptp(xs) == 0 or np.ptp(ys) == 0:
        return Trend(len(xs))
    line: Any = stats.linregress(xs, ys)
    return Trend(
        len(xs), float(line.slope), float(line.intercept), float(line.rvalue), float(line.pvalue)
    )


def table(means: Frame, layout: Layout) -> Frame:
    """domain -> rho, p, n over methods; the zero-shot average and, for S2ORC, the STEM average at
    the end."""
    rows = means.loc[compared(list(means.index))]
    columns = {d: rows[d] for d in layout.zero_shot if d in rows}
    # skipna=False: an average over fewer domains is another quantity
    columns["zs_avg"] = rows[list(columns)].mean(axis=1, skipna=False)
    if set(STEM) <= set(columns):
        columns["stem_avg"] = rows[list(STEM)].mean(axis=1, skipna=False)
    found = {name: trend(rows[layout.train], values) for name, values in columns.items()}
    return pd.DataFrame({name: {"rho": t.rho, "p": t.p, "n": t.n} for name, t in found.items()}).T


def panels(means: Frame, layout: Layout, most: int = 3) -> list[Panel]:
    """The group that follows the training domain, then the domains that go against it, at most
    `most` in all.

    The group of S2ORC is the paper's STEM; elsewhere it is every domain with rho > 0.
    """
    rho = table(means, layout)["rho"].reindex([d for d in layout.zero_shot if d in means])
    # the strongest first: the panels end at `most`
    against = list(rho[rho < 0].sort_values().index)
    together = list(STEM) if set(STEM) <= set(rho.index) else list(rho[rho > 0].index)
    groups = [
        (
            "STEM average"
            if together == list(STEM)
            else f"average of {len(together)} with rho > 0",
            together,
        )
    ]
    groups += [(domain, [domain]) for domain in against if domain not in together]
    return [panel(means, layout, title, columns) for title, columns in groups[:most] if columns]


def panel(means: Frame, layout: Layout, title: str, columns: Sequence[str]) -> Panel:
    """The average of `columns` against the training domain, with both lines."""
    rows = means.loc[compared(list(means.index))]
    points = pd.DataFrame(
        {"x": rows[layout.train], "y": rows[list(columns)].mean(axis=1, skipna=False)}
    ).dropna()
    # TRAM's rows are judged by the earlier methods' line, so they have no part in it
    # an array of bool even where nothing is left: an empty index keeps its type, text
    tram = np.array([is_tram(method) for method in points.index], dtype=bool)
    earlier, own = points[~tram], points[tram]
    line = trend(earlier["x"].tolist(), earlier["y"].tolist())
    below = (
        float(np.mean([line.at(x) - y for x, y in zip(own["x"], own["y"], strict=True)]))
        if len(own)
        else math.nan
    )
    return Panel(title, points, line, trend(own["x"].tolist(), own["y"].tolist()), below)

"""Which rows of a column are best and worst as far as the seeds can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tram_ds.comparison.blocks import Row, mark
from tram_ds.comparison.collect import Table
from tram_ds.comparison.paper import Column
from tram_ds.comparison.significance import t_half_width

LEVEL = 0.95  # of all comparisons of a column together
LEGEND = "best, worst: what seeds do not tell from the first, the last (95 % t intervals)"


@dataclass(frozen=True)
class Ends:
    """The first and the last of a column, each with those that are not separable from it.

    pairs: seeds that both ends have.
    """

    first: set[str]
    last: set[str]
    separable: bool
    pairs: int


def marked(
    rows: Sequence[Row], columns: Sequence[str], table: Table
) -> tuple[list[Row], list[str]]:
    """The rows with best and worst marked, and notes that name the columns where nothing is."""
    methods = [method for method, _ in rows if method in table.runs]
    found = {column: ends(table, column, methods) for column in columns}
    untold: dict[str, list[str]] = {}
    for column, of_column in found.items():
        if of_column is not None and not of_column.separable:
            untold.setdefault(f"n = {of_column.pairs}", []).append(column)
    marks = [
        {"best": e.first - e.last, "worst": e.last - e.first} if e and e.separable else {}
        for e in found.values()
    ]
    notes = [
        f"no best or worst, not separable ({n}): {_named(names, columns)}"
        for n, names in untold.items()
    ]
    return mark(rows, marks), notes


def _named(names: Sequence[str], columns: Sequence[str]) -> str:
    return "in any column" if len(names) == len(columns) else ", ".join(names)


def ends(table: Table, column: str, methods: Sequence[str]) -> Ends | None:
    """The ends of a column of scores among these methods; None where fewer than two have a
    score."""
    layout = table.layout
    scores = table.values[column].unstack("method")[list(methods)]
    # times gain: from here on the highest is the best
    means = scores.mean().dropna() * layout.gain
    if len(means) < 2:
        return None
    # Bonferroni over all pairs: the same numbers said which row is first
    level = 1 - (1 - LEVEL) / math.comb(len(means), 2)
    shown = {m: f"{value:.{layout.digits}f}" for m, value in means.items()}
    with np.errstate(divide="ignore"):
        # perplexities by their ratio: seeds move them by a share of themselves
        scaled = (np.log(scores) if layout.log else scores) * layout.gain
    top, bottom = str(means.idxmax()), str(means.idxmin())

    def apart(better: str, worse: str) -> bool:
        return shown[better] != shown[worse] and _above(scaled[better] - scaled[worse], level)

    first = {m for m in shown if not apart(top, m)}
    last = {m for m in shown if not apart(m, bottom)}
    pairs = int((scores[top] - scores[bottom]).count())
    return Ends(first, last, bottom not in first, pairs)


def _above(differences: Column, level: float) -> bool:
    """Whether the interval of the mean difference by seed is above zero; one pair has none."""
    found = differences.dropna().tolist()
    half = t_half_width(found, level)
    return math.isfinite(half) and float(np.mean(found)) > half

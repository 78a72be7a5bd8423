"""Further blocks: how zero-shot scores follow the training domain (Table 9, Figure 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tram_ds.comparison import correlation, paper
from tram_ds.comparison.blocks import Block, Cell, number
from tram_ds.comparison.correlation import ENOUGH, Panel, Trend
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.paper import Frame
from tram_ds.comparison.tables import recomputed

SPLITS = {"m2d2_s2orc": "s2orc", "m2d2_wiki": "wiki"}  # table -> its part of Table 9


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
                # printed with one decimal: 0.05 is its rounding, the rest that of doubles
                Cell("" if abs(printed - ours) < 0.0501 else "yes"),
            ],
        )
        for method, printed, ours in zip(
            again.index, again["printed"], again["recomputed"], strict=True
        )
    ]
    return Block(
        "averages",
        f"the paper's averages: {layout.title}",
        ("printed", "recomputed", "differs"),
        rows,
    )

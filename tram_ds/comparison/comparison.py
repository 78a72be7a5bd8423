"""A comparison: for every table its blocks and figures, in the order they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from tram_ds.comparison import (
    collect,
    correlation,
    frontier_plot,
    frontier_views,
    plots,
    row_draws,
    tables,
    versus,
    views,
)
from tram_ds.comparison.blocks import Block
from tram_ds.comparison.collect import Table
from tram_ds.comparison.compute import compute
from tram_ds.comparison.frontier_runs import sides
from tram_ds.comparison.layouts import TABLES, Layout, paper_layout
from tram_ds.comparison.lines import off_lines
from tram_ds.comparison.paper import Frame
from tram_ds.comparison.paper_marks import marks
from tram_ds.comparison.row_draws import Draws
from tram_ds.comparison.run import ANALYSES, CompareError, Run
from tram_ds.comparison.terms import explained

CURVES = (
    "loss against compute, a line per method: the mean over seeds, in a band from the lowest to "
    "the highest of them"
)


@dataclass(frozen=True)
class Drawing:
    """A figure. name: of its file. alt: what it shows, in words."""

    name: str
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """One table's part of the comparison. runs: those it is made of; none where it shows the paper
    alone."""

    layout: Layout
    blocks: list[Block]
    drawings: list[Drawing] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def compare(
    runs: Sequence[Run],
    table: str = "auto",
    baseline: str | None = None,
    alpha: float = 0.01,
    frontier: bool = False,
) -> list[Section]:
    """A section per table. frontier: with residuals off that of plain training. ValueError says
    what does not fit: no runs for the table, no such baseline, no table with a frontier."""
    tables = [collect.gather(members, layout) for layout, members in collect.parts(runs, table)]
    if frontier and not any(map(_has_frontier, tables)):
        raise CompareError(
            "--frontier: needs runs scored on their training domain and on others, in perplexity "
            "or accuracy"
        )
    return [_section(each, baseline, alpha, frontier and _has_frontier(each)) for each in tables]


def _has_frontier(table: Table) -> bool:
    layout = table.layout
    outside = [c for c in table.values if c in layout.zero_shot]
    inside = layout.train is not None and layout.train in table.values
    return inside and bool(outside) and layout.metric in ("perplexity", "accuracy")


def paper_alone(table: str = "auto") -> list[Section]:
    """The paper's numbers by themselves, with what can be recomputed from them: averages, Table 9,
    Figure 2."""
    return [_paper_section(paper_layout(name)) for name in (TABLES if table == "auto" else [table])]


def _section(table: Table, baseline: str | None, alpha: float, frontier: bool) -> Section:
    """What matters first; spreads, the paper's own figures and correlations follow."""
    layout, means = table.layout, table.means()
    plain, trained = versus.baseline_of(table, baseline), layout.metric not in ANALYSES
    blocks = [] if trained or layout.train is None else [versus.transfer(table)]
    rows = row_draws.draws(table, between=frontier) if trained and table.runs else Draws()
    found = sides(table, rows) if frontier else None
    blocks += [
        tables.scores(table),
        *(frontier_views.blocks(table, found) if found else ()),
        *filter(None, [tables.against_paper(table)]),
        tables.summary(table),
    ]
    blocks += [versus.significance(table, plain, alpha, rows)] if len(means) > 1 else []
    blocks += [compute(table, plain)] if trained else []
    blocks += tables.spread(table)
    blocks += (
        [tables.printed(layout, [*table.values.columns, "zs_avg"])]
        if layout.paper is not None
        else []
    )
    strokes = ", upright strokes the paper's figures" if layout.paper is not None else ""
    kind = "geometric mean" if layout.log else "mean"
    alt = f"{kind} {layout.summary}: dots are seeds, bars 95 % intervals{strokes}"
    drawings = [Drawing("averages", alt, plots.averages(table))]
    if found and (found.base or found.methods):
        figure = frontier_plot.drawn(found, layout)
        drawings.insert(0, Drawing("frontier", frontier_plot.ALT, figure))
    if trained and (drawn := plots.curves(table)) is not None:
        drawings.append(Drawing("compute", CURVES, drawn))
    more, figures = _correlated(means, layout) if trained and layout.train else ([], [])
    runs = [run for of_method in table.runs.values() for run in of_method]
    return Section(layout, _explained(blocks + more, layout), drawings + figures, runs)


def _explained(blocks: Sequence[Block], layout: Layout) -> list[Block]:
    return [explained(block, layout) for block in blocks]


def _correlated(means: Frame, layout: Layout) -> tuple[list[Block], list[Drawing]]:
    outside = set(means.columns) & set(layout.zero_shot)
    if layout.train not in means or not correlation.compared(list(means.index)) or not outside:
        return [], []
    panels = correlation.panels(means, layout)
    blocks = [views.correlations(means, layout)]
    if not panels:
        return blocks, []
    alt = (
        f"zero-shot {layout.metric} against that of {layout.train}, with lines for earlier "
        "methods and TRAM"
    )
    return [*blocks, views.trends(panels, layout)], [
        Drawing("figure2", alt, plots.figure2(panels, layout))
    ]


def _paper_section(layout: Layout) -> Section:
    assert layout.paper is not None
    blocks = [tables.printed(layout)]
    blocks += [views.averages(layout)] if len(layout.domains) > 1 and layout.train else []
    more, drawings = (
        _correlated(layout.paper, layout) if layout.metric == "perplexity" else ([], [])
    )
    lines = off_lines(layout.paper, layout, *marks(layout)) if layout.train else []
    return Section(layout, _explained(blocks + lines + more, layout), drawings)


def blocks_of(sections: Sequence[Section], names: Sequence[str] | None = None) -> list[Block]:
    """All blocks, or those of these names in every section. ValueError, with the names there are,
    for another one."""
    found = [block for section in sections for block in section.blocks]
    there = list(dict.fromkeys(block.name for block in found))
    for name in names or []:
        if name not in there:
            raise ValueError(f"--only {name}: no such block; there are {', '.join(there)}")
    return [block for block in found if names is None or block.name in names]

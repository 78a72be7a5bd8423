"""Figures of a comparison, drawn so that they can be read on a light and on a dark page.

Text, axes and grid take the colour of the page's text: `svg` writes them as `currentColor`. Points
and lines have colours of middle lightness, and shapes of their own, so that colour is never all
that tells them apart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tram_ds.comparison.collect import Table
from tram_ds.comparison.compute import along
from tram_ds.comparison.correlation import Panel, Trend, is_tram
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.run import Run
from tram_ds.comparison.significance import Interval, mean_interval

INK = "#010203"  # stands for the page's text colour
EARLIER, TRAM, GREY = "#3b82d0", "#1f9d6b", "#8a8f98"
LINES = ("#3b82d0", "#1f9d6b", "#d9822b", "#a367c9", "#d1495b", "#8a8f98", "#2aa5b5", "#b08d2f")
DASHES = ("-", "--", ":", "-.")
SHAPES = "osD^vPX*<>hpd"


def figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, inches, with axes in a row."""
    # not pyplot, which keeps every figure of the process until it is closed
    made = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = [made.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.set_facecolor("none")
        ax.tick_params(colors=INK, labelsize=9)
        ax.grid(color=INK, alpha=0.15, linewidth=0.8)
        ax.set_axisbelow(True)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
            spine.set_alpha(0.5)
    return made, axes


def label(ax: Axes, title: str, x: str, y: str = "") -> None:
    """Title and axis labels in the page's colour."""
    ax.set_title(title, color=INK, fontsize=10, loc="left")
    ax.set_xlabel(x, color=INK, fontsize=9)
    ax.set_ylabel(y, color=INK, fontsize=9)


def svg(made: Figure, alt: str) -> str:
    """The figure as an <svg> element for a page: it scales, its text is text, and it follows the
    page's colour."""
    import matplotlib

    out = io.StringIO()
    # text stays text; matplotlib's ids are hashes of content and salt, by default a random one:
    # figures of one page need other ids, and the same figure is to be the same text every time
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": alt, "font.family": "sans-serif"}
    ):
        FigureCanvasSVG(made).print_svg(out, metadata={"Date": None, "Creator": None})
    # without the XML declaration and the DOCTYPE, which have no place inside an HTML page
    text = out.getvalue()[out.getvalue().index("<svg") :].replace(INK, "currentColor")
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" style="max-width: {made.get_figwidth() * 96:.0f}px" role="img">',
        text,
        count=1,
    )
    escaped = alt.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace(
        'role="img">', f'role="img" xmlns="http://www.w3.org/2000/svg"><title>{escaped}</title>', 1
    )


def png(made: Figure) -> bytes:
    """The figure as a PNG on white."""
    out = io.BytesIO()
    FigureCanvasAgg(made)
    made.savefig(out, format="png", dpi=130, facecolor="white")
    return out.getvalue()


def averages(table: Table) -> Figure:
    """The summary of every method: seeds as dots, mean and 95 % interval, the paper's figure where
    there is one."""
    layout, name = table.layout, table.layout.summary
    methods = table.methods[::-1]
    made, (ax,) = figure(7.2, 1.3 + 0.32 * len(methods))
    for row, method in enumerate(methods):
        values = table.of(method)[name].dropna().tolist()
        colour = TRAM if is_tram(method) else EARLIER
        ax.plot(values, [row] * len(values), ".", color=colour, alpha=0.45, markersize=7, zorder=2)
        if values:
            _interval(ax, row, mean_interval(values, layout.log), colour)
        if layout.paper is not None and method in layout.paper.index and name in layout.paper:
            x = float(layout.paper.loc[method, name])
            ax.plot(x, row, "|", color=INK, markersize=13, markeredgewidth=1.6, zorder=4)
    if table.pretrained is not None and math.isfinite(table.pretrained[name]):
        ax.axvline(table.pretrained[name], color=GREY, linestyle=":", linewidth=1.5)
        at = (float(table.pretrained[name]), 1.0)
        ax.annotate(
            "pre-trained",
            at,
            xycoords=("data", "axes fraction"),
            color=INK,
            fontsize=8,
            ha="center",
            va="bottom",
        )
    ax.set_yticks(range(len(methods)), methods)
    ax.set_ylim(-0.7, len(methods) - 0.3)
    arrow = "lower is better" if layout.lower_is_better else "higher is better"
    label(ax, "", f"{name}, {layout.metric} ({arrow})")
    return made


def _interval(ax: Axes, row: int, found: Interval, colour: str) -> None:
    bounds = (found.mean - found.low, found.high - found.mean)
    ax.errorbar(
        found.mean,
        row,
        xerr=[[width if math.isfinite(width) else 0.0] for width in bounds],
        fmt="D",
        color=colour,
        markersize=5,
        capsize=3,
        zorder=3,
    )


def figure2(panels: Sequence[Panel], layout: Layout) -> Figure:
    """Zero-shot against training-domain scores with the lines of the earlier methods and of
    TRAM."""
    made, axes = figure(3.6 * len(panels), 3.9, len(panels))
    methods = list(panels[0].points.index)
    for ax, shown in zip(axes, panels, strict=True):
        for method, (x, y) in shown.points.iterrows():
            colour = TRAM if is_tram(str(method)) else EARLIER
            shape = SHAPES[methods.index(method) % len(SHAPES)] if method in methods else "o"
            ax.plot(x, y, shape, color=colour, markersize=6, label=str(method), linestyle="none")
        span = np.array([shown.points["x"].min(), shown.points["x"].max()])
        for line, colour, dash in ((shown.earlier, EARLIER, ":"), (shown.tram, TRAM, "--")):
            if math.isfinite(line.slope):
                ax.plot(span, [line.at(v) for v in span], dash, color=colour, linewidth=1.6)
        ax.margins(0.08)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        label(
            ax,
            f"{shown.title}\n{_rho(shown.earlier)}",
            str(layout.train),
            layout.metric if ax is axes[0] else "",
        )
    handles, names = axes[0].get_legend_handles_labels()
    made.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(2 * len(panels), len(names)),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )
    return made


def _rho(line: Trend) -> str:
    if not math.isfinite(line.rho):
        return f"{line.n} earlier methods: not enough"
    return (
        f"earlier: \N{GREEK SMALL LETTER RHO} = "
        f"{line.rho:.2f}{', p < 0.01' if line.p < 0.01 else ''}"
    )


def curves(table: Table) -> Figure | None:
    """Loss against compute, one line per method: the mean of its seeds, in a band from their lowest
    to their highest. None where no run has a curve."""
    shown = {
        method: drawn
        for method, runs in table.runs.items()
        if (drawn := [run for run in runs if len(run.course.curve) > 1])
    }
    if not shown:
        return None
    made, (ax,) = figure(7.2, 3.8)
    for i, (method, runs) in enumerate(shown.items()):
        x, losses = _together(runs)
        colour = LINES[i % len(LINES)]
        dash = DASHES[i // len(LINES) % len(DASHES)]
        seeds = f" (n = {len(runs)})" if len(runs) > 1 else ""
        ax.plot(x, losses.mean(axis=0), dash, color=colour, linewidth=1.7, label=method + seeds)
        if len(runs) > 1:
            low, high = losses.min(axis=0), losses.max(axis=0)
            ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    kind = next(iter(shown.values()))[0].course.kind
    label(ax, "", "compute, in examples of plain training", f"{kind} loss")
    made.legend(loc="outside right upper", fontsize=8, frameon=False, labelcolor=INK)
    return made


def _together(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """(x, (runs, x) losses): the curves at the points of all of them, as far as every one
    reaches."""
    lines = [(along(run), [loss for _, loss in run.course.curve]) for run in runs]
    begin, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    at = np.unique([value for x, _ in lines for value in x if begin <= value <= end])
    return at, np.stack([np.interp(at, x, losses) for x, losses in lines])

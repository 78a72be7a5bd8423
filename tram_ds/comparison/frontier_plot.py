"""The frontier as a figure: a point a run, the seeds of a row joined, the base arms' curves in
their bands."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tram_ds.comparison.correlation import is_tram
from tram_ds.comparison.frontier import Array, Scale, columns
from tram_ds.comparison.frontier_runs import Member, Sides
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.plots import DASHES, EARLIER, GREY, INK, LINES, SHAPES, TRAM, figure, label

ALT = (
    "zero-shot against in-domain, a point a run, seeds of a row joined; lines: the frontier of "
    "plain training in its 95\N{NO-BREAK SPACE}% band; dotted: interpolations with the pre-trained "
    "model"
)
OTHERS = tuple(c for c in LINES if c not in (EARLIER, TRAM, GREY))


def drawn(found: Sides, layout: Layout) -> Figure:
    """Both axes on the scale on which residuals are differences; better is below and left, of
    accuracies above and right."""
    made, (ax,) = figure(7.6, 5.2)
    unit = min(found.budgets, default=1.0)
    for i, (budget, members) in enumerate(found.budgets.items()):
        frontier = found.frontiers()[budget]
        name, dash = f"base, {budget / unit:.3g} x steps", DASHES[i % len(DASHES)]
        shape = "osD^"[i % 4]
        if frontier is not None:
            x = np.linspace(*frontier.span, 60)
            ax.plot(x, frontier.at(x)[:, 0], dash, color=GREY, linewidth=1.8, zorder=2)
            ax.fill_between(x, *frontier.band(x), color=GREY, alpha=0.22, linewidth=0, zorder=1)
        for k, member in enumerate(members):
            _seeds(ax, member, found.scale, shape, GREY, name if k == 0 else "")
    for i, member in enumerate(found.methods):
        colour = TRAM if is_tram(member.arm.name) else OTHERS[i % len(OTHERS)]
        shape = SHAPES[i % len(SHAPES)]
        _seeds(ax, member, found.scale, shape, colour, f"{member.arm.name} (n = {member.arm.n})")
    # before the dotted lines: set limits end matplotlib's autoscaling, which would follow them
    _view(ax, found)
    for curves in found.curves.values():
        for curve in curves:
            y = columns(curve, found.scale)[:, 0]
            ax.plot(curve[:, 0], y, ":", color=INK, alpha=0.45, linewidth=1.1, zorder=1)
    _ticks(ax, found.scale)
    better = "lower is better" if layout.lower_is_better else "higher is better"
    scale = "log scale" if layout.log else "logit scale"
    label(ax, "", f"{layout.train}, {layout.metric} ({scale})", f"zero-shot average ({better})")
    made.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False, labelcolor=INK)
    return made


def _points(member: Member, scale: Scale) -> tuple[Array, Array]:
    return member.arm.scores[:, 0], columns(member.arm.scores, scale)[:, 0]


def _seeds(ax: Axes, member: Member, scale: Scale, shape: str, colour: str, name: str) -> None:
    """Every seed, joined to their middle."""
    x, y = _points(member, scale)
    for a, b in zip(x, y, strict=True):
        ax.plot([x.mean(), a], [y.mean(), b], "-", color=colour, alpha=0.5, linewidth=1.0, zorder=3)
    ax.plot(x, y, shape, color=colour, alpha=0.9, markersize=5.5, zorder=4, label=name or None)


def _view(ax: Axes, found: Sides) -> None:
    """The runs fill the picture: a pre-trained model may be far away."""
    points = [_points(m, found.scale) for m in (*found.base, *found.methods, *found.interpolated)]
    for values, limit, flip in (
        (np.concatenate([x for x, _ in points]), ax.set_xlim, ax.invert_xaxis),
        (np.concatenate([y for _, y in points]), ax.set_ylim, ax.invert_yaxis),
    ):
        edge = 0.08 * (float(np.ptp(values)) or 0.1)
        limit(float(values.min()) - edge, float(values.max()) + edge)
        if not found.scale.log:
            flip()


def _ticks(ax: Axes, scale: Scale) -> None:
    """Round scores, where they lie on the scale."""
    for axis in (ax.xaxis, ax.yaxis):
        # sorted: the logit of the error falls where accuracy rises
        ends = sorted(float(v) for v in scale.down(np.array(axis.get_view_interval())))
        scores = [v for v in MaxNLocator(6).tick_values(*ends) if ends[0] <= v <= ends[1]]
        axis.set_ticks(scale.up(np.array(scores)).tolist(), [f"{v:g}" for v in scores])

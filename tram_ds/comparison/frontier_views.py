"""The frontier's blocks: each row's residual off plain training at equal steps and at equal FLOPs,
with what can be said of it, and the same by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tram_ds.comparison import significance
from tram_ds.comparison.blocks import NONE, Block, Cell, number
from tram_ds.comparison.collect import Table
from tram_ds.comparison.frontier import LEAST, Frontier, Scale, residuals
from tram_ds.comparison.frontier_runs import EQUAL, Member, Sides
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.lines import in_unit, off_lines
from tram_ds.comparison.residual import LEVEL, Residual, verdict
from tram_ds.comparison.row_draws import Draws

MARGIN = {True: 0.01, False: 0.04}  # log: 1 %; logit: a point of accuracy near 60 %
SEEDS, ROWS = "95 %, seeds", "95 %, seeds and rows"
COLUMNS = {
    "verdict": "what the seeds can tell, corrected for the number of rows",
    "off": "zero-shot average off the frontier of plain training at that in-domain score",
    SEEDS: "interval of that over seeds, of the row and of the base arms",
    "95 %, domains too": "the same where the domains are drawn too: for others of their kind",
    "n": "runs of the row with different random numbers, of which the interval is",
    "in-domain": "score on the domain trained on, where the frontier is looked up",
    "zero-shot": "zero-shot average of the row",
    "compute": "training compute, as a multiple of the base arms' with the fewest steps",
}


OF_ROWS = (
    "interval of that over seeds, of the row and of the base arms, and over the rows of the test "
    "sets, which are the same for all runs"
)


def _columns(rows: Draws | None) -> dict[str, str]:
    """Name -> meaning; the interval's says what is drawn."""
    if rows is None or not rows.scores:
        return COLUMNS
    return {ROWS if c == SEEDS else c: OF_ROWS if c == SEEDS else m for c, m in COLUMNS.items()}


def blocks(table: Table, found: Sides) -> list[Block]:
    """At equal steps and at equal FLOPs: residuals and verdicts, and residuals by domain; then
    every row off the line of the others."""
    frontiers, layout = found.frontiers(), table.layout
    made = []
    for kind in EQUAL:
        shown = _residuals(found, frontiers, kind)
        title = f"{layout.title}: off the frontier of plain training at equal {kind}"
        name = f"frontier_{kind.lower()}"
        rows = _rows(found, shown)
        notes = (*_told(layout, found, len(rows)), *_missing(found, frontiers, kind))
        named = _columns(found.rows)
        made.append(Block(name, title, tuple(named), rows, notes, meanings=named))
        if len(found.domains) > 1 and shown:
            made.append(_by_domain(f"{name}_domains", f"{title}, by domain", layout, found, shown))
    return made + off_lines(table.means(), layout)


Shown = dict[str, list[Residual]]  # row -> of the average, then of every domain


def _residuals(found: Sides, frontiers: dict[float, Frontier | None], kind: str) -> Shown:
    """Of the rows that there is a frontier for."""
    shown: Shown = {}
    members = (*found.methods, *found.interpolated)
    for budget, frontier in frontiers.items():
        there = [m.arm for m in members if found.budget(m, kind) == budget]
        if frontier is not None and there:
            of = residuals(frontier, there)
            shown |= {arm.name: each for arm, each in zip(there, of, strict=True)}
    return {m.arm.name: shown[m.arm.name] for m in members if m.arm.name in shown}


def _rows(found: Sides, shown: Shown) -> list[tuple[str, list[Cell]]]:
    corrected = dict(zip(shown, significance.holm([of[0].p for of in shown.values()]), strict=True))
    unit = min(found.budgets, default=1.0)
    rows = []
    for member in (*found.methods, *found.interpolated):
        name, scale = member.arm.name, found.scale
        inside, outside = _scores(member, scale)
        facts = [
            Cell(str(member.arm.n), member.arm.n),
            number(inside, 2),
            number(outside, 2),
            Cell(f"{member.examples / unit:.3g} x", member.examples / unit),
        ]
        cells = [Cell("no frontier: see the notes"), *[Cell(NONE)] * 3]
        if name in shown:
            of = shown[name][0]
            said = verdict(of, corrected[name], MARGIN[scale.log], len(shown))
            domains = _interval(of.over_domains, of, scale) if of.of_domains > 1 else Cell(NONE)
            off = in_unit(of.value, of.level, scale, 2)
            cells = [Cell(said), off, _interval(of.interval, of, scale), domains]
        rows.append((name, cells + facts))
    return rows


def _scores(member: Member, scale: Scale) -> tuple[float, float]:
    """(in-domain, zero-shot average): means over seeds on the scale, as scores."""
    scores = scale.down(member.arm.mean)
    return float(scores[0]), float(scores[1:].mean())


def _interval(bounds: tuple[float, float], of: Residual, scale: Scale) -> Cell:
    """[low, high] in the unit of residuals; a dash where there is none. value: the upper bound."""
    ends = sorted((in_unit(b, of.level, scale, 2) for b in bounds), key=lambda c: c.value)
    if NONE in [c.text for c in ends]:
        return Cell(NONE)
    low, high = (end.text.removesuffix(" %") for end in ends)
    unit = "\N{NO-BREAK SPACE}%" * scale.log
    return Cell(f"[{low}, {high}]{unit}", ends[1].value)


def _by_domain(name: str, title: str, layout: Layout, found: Sides, shown: Shown) -> Block:
    tests = [of.p for each in shown.values() for of in each[1:]]
    corrected = iter(significance.holm(tests))
    rows = []
    for row, each in shown.items():
        cells = []
        for of in each[1:]:
            p = next(corrected)
            cell = in_unit(of.value, of.level, found.scale, 2)
            star = " *" if p is not None and p < 1 - LEVEL else ""
            cells.append(replace(cell, text=cell.text + star))
        rows.append((row, cells))
    meanings = {d: f"off the frontier of plain training on {d}" for d in found.domains}
    notes = (f"*: off the frontier at 5 %, corrected for all {len(tests)} numbers",)
    return Block(name, title, found.domains, rows, notes, meanings=meanings)


def _told(layout: Layout, found: Sides, rows: int) -> list[str]:
    """How it is computed."""
    what = "log perplexity" if layout.log else "logit of the error"
    sign = "percent, negative is better" if layout.log else "points, positive is better"
    near = "1 %" if layout.log else f"{MARGIN[False]:g} in the logit, about a point"
    unit = min(found.budgets, default=1.0)
    arms = [
        f"{b / unit:.3g} x: {len(of)} arms of {_span([m.arm.n for m in of])}"
        for b, of in found.budgets.items()
    ]
    return [
        f"frontier: monotone spline of zero-shot on in-domain {what} through the base arms of as "
        f"many steps ({'; '.join(arms) or 'none'}); off it in {sign}",
        f"verdict: at 5 %, corrected for {rows} rows (Holm); on: the interval lies within {near}; "
        "seeds needed: for 80 % power at the residual observed, corrected for as many rows, by the "
        "row and every base arm",
        "intervals take the runs of one seed for independent; what they share makes them too wide",
        _drawn(found.rows),
        *found.notes,
    ]


def _drawn(rows: Draws | None) -> str:
    if rows is not None and rows.scores:
        return (
            "seeds, domains and the rows of the test sets are drawn: in one draw the same rows for "
            "all runs, each domain's by themselves; the rows of a domain are taken for independent"
        )
    why = "runs keep one score a domain" if rows is None else rows.lacking
    return (
        f"seeds and domains are drawn, single rows of a test set are not: {why}; the sampling "
        "error of a small set, which all rows share, is in no interval"
    )


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}{f' to {high}' if high > low else ''} seed{'s' * (high > 1)}"


def _missing(found: Sides, frontiers: dict[float, Frontier | None], kind: str) -> list[str]:
    """What would have to be trained for the rows that have no frontier."""
    notes = [
        f"missing: base arms with {budget:g} examples: {LEAST} that differ in-domain are needed, "
        "with another optimizer.lr"
        for budget, frontier in frontiers.items()
        if frontier is None
    ]
    unit = min(found.budgets, default=1.0)
    there = ", ".join(f"{b / unit:.3g} x" for b in found.budgets) or "none"
    lacking: dict[str, list[str]] = {}
    for member in (*found.methods, *found.interpolated):
        if found.budget(member, kind) is None:
            lacking.setdefault(f"{member.spent(kind) / unit:.3g} x", []).append(member.arm.name)
    notes += [
        f"missing: base arms at equal {kind} ({times}) of {', '.join(names)}; there are {there}"
        for times, names in lacking.items()
    ]
    if kind == "FLOPs" and not found.curves_there:
        notes.append(
            "missing: interpolation curves: launch/evaluate.py --interpolate 0.25,0.5,0.75 --model "
            "RUN --out RUN/analysis/interpolation.json"
        )
    return notes

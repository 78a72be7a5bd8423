"""A trace beside the plan of the same recipe, as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tram_ds.bench.trace import Trace, trace
from tram_ds.planning.plan import Plan, plan
from tram_ds.recipe.recipe import Recipe

GB = 1e9


def show(recipe: Recipe, world: int, console: Console | None = None) -> None:
    """Prints what one of `world` ranks was found to hold, send and compute, beside what the formula
    has. ValueError where it cannot be traced: see `trace.refuse`, which asks that beforehand."""
    console = console or Console(width=150, highlight=False)
    alone = recipe.checkpoint.model_copy(update={"asynchronous": False})  # no save beside the step
    planned = plan(recipe.model_copy(update={"checkpoint": alone}), world)
    found = trace(recipe, world)
    console.print(
        f"[bold]traced[/]: {planned.algorithm} as one of {world} rank(s), in fake tensors"
    )
    console.print(_peak(found, planned))
    console.print(_collectives(found, planned))
    flops = planned.cost.hardware_flops / world
    console.print(
        f"PFLOP of this rank: {found.flops / 1e15:.4g} traced, {flops / 1e15:.4g} planned, "
        "recomputation counted\n"
    )


def _peak(found: Trace, planned: Plan) -> Table:
    table = Table(title="GB at the peak, by kind", title_justify="left")
    kinds = {kind.lower(): size for kind, size in found.peak.items() if size}
    for kind in [*kinds, "total", "planned", "planned / traced"]:
        table.add_column(kind, justify="right")
    total = planned.memory.total
    sizes = [*kinds.values(), found.total, total]
    table.add_row(*(f"{size / GB:.2f}" for size in sizes), f"{total / found.total:.3f}")
    return table


def _collectives(found: Trace, planned: Plan) -> Table:
    table = Table(title="collectives of the step, bytes of whole tensors", title_justify="left")
    for name in ("collective", "calls", "GB", "GB planned"):
        table.add_column(name, justify="left" if name == "collective" else "right")
    for kind, calls in sorted(found.calls.items()):
        sent = planned.cost.sent.get(kind)
        table.add_row(
            kind,
            str(calls),
            f"{found.bytes.get(kind, 0) / GB:.2f}",
            "" if sent is None else f"{sent / GB:.2f}",
        )
    return table

"""A plan as text: the tables of launch/plan.py and of docs/planning.md."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tram_ds.planning import plan as planning
from tram_ds.planning.cost import PEAK
from tram_ds.planning.host import drawing
from tram_ds.planning.plan import USABLE, Plan
from tram_ds.planning.sizes import ModelSize
from tram_ds.recipe.recipe import Recipe

GIB = 2**30
LARGEST = 4096
DOCUMENTED = {
    "gpt2-xl": (1, 4, 8, 64),
    "7b": (4, 8, 16, 64, 512),
    "13b": (8, 16, 64, 512),
    "70b": (16, 64, 512, 4096),
}
ROWS = ("base", "sam", "tram_x", "tram_prev")


@dataclass(frozen=True)
class Assumed:
    """What the machines are taken to be. memory: GB (10^9 bytes) per GPU; tflops: dense peak in the
    recipe's precision."""

    gpu: str
    memory: float
    tflops: float
    mfu: float


def assumptions(gpu: str, memory: float | None, mfu: float, dtype: str) -> Assumed:
    """ValueError for a GPU whose peak is not known here, or a share that is none."""
    if gpu not in PEAK:
        raise ValueError(
            f"--gpu {gpu}: its peak is not known here; choose one of {', '.join(PEAK)}"
        )
    half, single, sold = PEAK[gpu]
    if not 0 < mfu <= 1:
        raise ValueError(
            f"--mfu {mfu}: a share of the GPU's peak, above 0 and at most 1 (0.45 is usual)"
        )
    if memory is not None and memory <= 0:
        raise ValueError(f"--gpu-memory {memory:g}: GB of one GPU, above 0 (80 for an A100)")
    return Assumed(gpu, memory or sold, half if dtype == "bfloat16" else single, mfu)


def gpu_counts(text: str) -> list[int]:
    """`4,8` as numbers; ValueError for what is not one of 1 to LARGEST."""
    parts = text.split(",")
    if bad := [
        part for part in parts if not part.strip().isdigit() or not 1 <= int(part) <= LARGEST
    ]:
        raise ValueError(
            f"--gpus {text}: {bad[0]!r} is not a number of GPUs; give 1 to {LARGEST}, separated "
            "by commas"
        )
    return [int(part) for part in parts]


def show(recipe: Recipe, world: int, assumed: Assumed, console: Console | None = None) -> bool:
    """Prints the plan on `world` GPUs; whether the recipe fits. RecipeError where its batch cannot
    be split over them."""
    console = console or Console(width=150, highlight=False)
    plans = planning.every_algorithm(recipe, world)
    own = next(p for p in plans if p.algorithm == recipe.algorithm.name)
    setup, size = own.setup, own.size
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {size.parameters:,} parameters"
        f"{_trained(size)}, {setup.engine} on {world} "
        "GPU(s), "
        f"{'bf16' if setup.half else 'fp32'} working copy, micro_batch {recipe.train.micro_batch} "
        f"x {setup.micros} accumulated, "
        f"activation checkpointing {'on' if setup.checkpointing else 'off'}"
    )
    console.print(_memory(own))
    console.print(_algorithms(recipe, plans, world, assumed))
    steps = recipe.train.steps
    length = (
        f"{steps:,} steps" if steps else "hours per 1,000 steps: train.epochs depends on the data"
    )
    console.print(
        f"assumed: {assumed.gpu} at {assumed.tflops:g} TFLOP/s x mfu {assumed.mfu:g}, time in "
        "model FLOPs "
        f"(recomputation not counted), {length}; "
        f"{USABLE:.0%} of {assumed.memory:g} GB for tensors, the rest for the context, NCCL and "
        "fragmentation; fused attention"
    )
    console.print(_host(own))
    fits = own.fits(assumed.memory * 1e9)
    verdict = (
        "fits" if fits else f"does not fit; {planning.advice(recipe, world, assumed.memory * 1e9)}"
    )
    console.print(
        f"{own.algorithm} on {world} x {assumed.memory:g} GB: {own.memory.total / 1e9:.1f} GB at "
        f"the peak: {verdict}\n"
    )
    return fits


def _host(own: Plan) -> str:
    """Of CPU memory, one line."""
    whole, host = 4 * own.size.parameters / 1e9, own.host
    drawn = drawing(own.setup, own.size) / 1e9
    offloaded = f"{host.offloaded / 1e9:.1f} GB offloaded, throughout; " if host.offloaded else ""
    return (
        f"host memory: at most {drawn:.1f} GB for each GPU of a node at the start, "
        f"where a model is drawn (model.init); {whole:.1f} GB where transformers merges its "
        "weights; of files a rank reads what it holds, and no more; "
        f"{offloaded}{host.saving / 1e9:.2f} GB while a checkpoint is written"
    )


def _trained(size: ModelSize) -> str:
    """How many of them train, where not all do."""
    if size.trained == size.parameters:
        return ""
    return f" ({size.trained:,} trained, {size.trained / size.parameters:.2%})"


def _memory(own: Plan) -> Table:
    table = Table(
        title=f"GB per GPU at the peak, {own.algorithm}: {own.memory.moment}", title_justify="left"
    )
    for part in [*own.memory.parts(), "total"]:
        table.add_column(part.replace("_", " "), justify="right")
    table.add_row(*(f"{v / 1e9:.2f}" for v in [*own.memory.parts().values(), own.memory.total]))
    return table


def _algorithms(recipe: Recipe, plans: list[Plan], world: int, assumed: Assumed) -> Table:
    table = Table()
    for name in (
        "algorithm",
        "GB per GPU",
        "",
        "forward units",
        "PFLOP per step",
        "GB sent per step",
        "bytes per parameter",
        "hours",
    ):
        table.add_column(name, justify="left" if name == "algorithm" else "right")
    for p in plans:
        sent = sum(p.cost.sent.values())
        hours = p.cost.hours(recipe.train.steps or 1000, world, assumed.tflops, assumed.mfu)
        table.add_row(
            f"[bold]{p.algorithm}[/]" if p.algorithm == recipe.algorithm.name else p.algorithm,
            f"{p.memory.total / 1e9:.2f}",
            "fits" if p.fits(assumed.memory * 1e9) else "too big",
            f"{p.cost.units:.3g}",
            f"{p.cost.model_flops / 1e15:.3g}",
            f"{sent / 1e9:.2f}",
            f"{sent / p.size.parameters:.1f}",
            f"{hours:,.2f}",
        )
    return table


def document() -> str:
    """docs/planning.md's tables, between its markers: peak GiB per GPU of published models under
    FSDP2."""
    lines = []
    for name, worlds in DOCUMENTED.items():
        first = planning.published(name, worlds[0], "base")
        lines += [f"### {name}: {first.size.parameters:,} parameters", ""]
        lines += [
            "| GPUs | " + " | ".join(ROWS) + " | tram_prev's states |",
            "|---|" + "---|" * (len(ROWS) + 1),
        ]
        for world in worlds:
            plans = [planning.published(name, world, row) for row in ROWS]
            cells = [f"{p.memory.total / GIB:.1f}" for p in plans] + [
                f"{plans[-1].memory.states / GIB:.1f}"
            ]
            lines.append(f"| {world} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)

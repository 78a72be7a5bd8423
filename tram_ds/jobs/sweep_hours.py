"""What a sweep costs before it starts: GPU hours of the cells that are to be run."""

from __future__ import annotations

from collections.abc import Sequence

from tram_ds.jobs.sweep import Cell
from tram_ds.planning import report
from tram_ds.planning.plan import plan
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import short

MFU = 0.45  # as launch/plan.py assumes


def lines(cells: Sequence[Cell], gpu: str) -> list[str]:
    """A line a cell, and the sum: model FLOPs at MFU of the GPU's peak, without evaluation. A cell
    whose model or length is not known here has its reason. ValueError for an unknown GPU."""
    report.assumptions(gpu, None, MFU, "float32")  # an unknown GPU is refused before any model
    todo = [cell for cell in cells if not cell.finished]
    found, total, unknown = [], 0.0, 0
    for cell in todo:
        try:
            hours = _hours(cell, gpu)
        except (OSError, ValueError, DataError) as error:
            unknown += 1
            found.append(f"unknown  {cell.run_dir}  {short(' '.join(str(error).split()), 120)}")
            continue
        total += hours
        found.append(f"{hours:7.2f}  {cell.run_dir}")
    beside = f", and {unknown} whose hours are not known" if unknown else ""
    known = f"{len(todo) - unknown} of {len(cells)} cells{beside}"
    how = f"on one {gpu} at {MFU:g} of its peak, evaluation not counted"
    return ["GPU hours of the cells to run:", *found, f"{total:7.2f}  in all, of {known}: {how}"]


def _hours(cell: Cell, gpu: str) -> float:
    recipe = cell.recipe
    if recipe.train.steps is None:
        raise ValueError("train.epochs: how many steps that is depends on the data")
    assumed = report.assumptions(gpu, None, MFU, recipe.model.dtype)
    return plan(recipe, 1).cost.hours(recipe.train.steps, 1, assumed.tflops, assumed.mfu)

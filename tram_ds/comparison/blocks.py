"""What every comparison is made of: titled grids of text, whose cells keep their number for CSV and
MLflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tram_ds.comparison.layouts import Layout

NONE = "-"  # where there is no number


@dataclass(frozen=True)
class Cell:
    """What is printed. value: the number behind it, NaN where there is none. mark: best, worst or
    nothing."""

    text: str
    value: float = math.nan
    mark: str = ""


@dataclass(frozen=True)
class Block:
    """A titled grid. rows: (label, cells), one cell per column. corner: what the labels are."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]
    notes: tuple[str, ...] = ()
    corner: str = "method"
    marked: bool = False  # are best and worst marked?


def number(value: float, digits: int, sign: bool = False) -> Cell:
    """A number as a cell; a dash where there is none."""
    if not math.isfinite(value):
        return Cell(NONE)
    return Cell(f"{value:{'+' if sign else ''}z.{digits}f}", float(value))


def with_spread(cell: Cell, spread: float, digits: int) -> Cell:
    """The cell with a plus-minus, if there is one."""
    return Cell(f"{cell.text} ± {spread:.{digits}f}", cell.value) if math.isfinite(spread) else cell


def marks(rows: Sequence[tuple[str, list[Cell]]], layout: Layout) -> list[tuple[str, list[Cell]]]:
    """The rows with the best and worst of every column marked, as printed: equal text is equal.
    None where all are equal."""
    marked = [(label, list(cells)) for label, cells in rows]
    for column in range(len(rows[0][1]) if rows else 0):
        contest = [
            r
            for r, (label, cells) in enumerate(rows)
            if label != "pretrained" and math.isfinite(cells[column].value)
        ]
        shown = {
            r: float(f"{rows[r][1][column].value:.{layout.digits}f}") * layout.gain for r in contest
        }
        if len(set(shown.values())) < 2:
            continue
        for r, value in shown.items():
            mark = (
                "best"
                if value == max(shown.values())
                else "worst"
                if value == min(shown.values())
                else ""
            )
            cell = marked[r][1][column]
            marked[r][1][column] = Cell(cell.text, cell.value, mark)
    return marked

"""What every comparison is made of: titled grids of text, whose cells keep their number for CSV and
MLflow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tram_ds.comparison.layouts import Layout

NONE = "-"  # where there is no number


@dataclass(frozen=True)
class Cell:
    """What is printed. value: the number behind it, NaN where there is none. mark: best, worst or
    nothing."""

    text: str
    value: float = math.nan
    mark: str = ""


Row = tuple[str, list[Cell]]  # label, a cell per column


@dataclass(frozen=True)
class Block:
    """A titled grid. rows: (label, cells), one cell per column. corner: what the labels are.

    legend: what the marks mean. meanings: column -> what it says, in words.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    notes: tuple[str, ...] = ()
    corner: str = "method"
    legend: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)

    @property
    def marked(self) -> bool:
        return any(cell.mark for _, cells in self.rows for cell in cells)


def number(value: float, digits: int, sign: bool = False) -> Cell:
    """A number as a cell; a dash where there is none."""
    if not math.isfinite(value):
        return Cell(NONE)
    # z: what rounds to zero has no minus, or a difference of nothing would look like one
    return Cell(f"{value:{'+' if sign else ''}z.{digits}f}", float(value))


def with_spread(cell: Cell, spread: float, digits: int) -> Cell:
    """The cell with a plus-minus, if there is one."""
    return Cell(f"{cell.text} ± {spread:.{digits}f}", cell.value) if math.isfinite(spread) else cell


def mark(rows: Sequence[Row], marks: Sequence[Mapping[str, Collection[str]]]) -> list[Row]:
    """The rows with their cells marked. marks: of every column, mark -> the rows that get it."""
    told = [{label: name for name, rows in of.items() for label in rows} for of in marks]
    return [
        (label, [replace(c, mark=of.get(label, "")) for c, of in zip(cells, told, strict=True)])
        for label, cells in rows
    ]


def as_printed(rows: Sequence[Row], layout: Layout) -> list[Row]:
    """The rows with the highest and the lowest number of every column marked: equal text is equal.
    None where all are equal."""
    marks = []
    for column in range(len(rows[0][1]) if rows else 0):
        shown = {
            label: float(f"{cells[column].value:.{layout.digits}f}") * layout.gain
            for label, cells in rows
            if label != "pretrained" and math.isfinite(cells[column].value)
        }
        ends = {"best": max, "worst": min} if len(set(shown.values())) > 1 else {}
        marks.append(
            {
                name: [label for label, value in shown.items() if value == end(shown.values())]
                for name, end in ends.items()
            }
        )
    return mark(rows, marks)

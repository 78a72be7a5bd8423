"""docs/planning.md's table of traces beside the plan's formula.

python -m tests.bench.trace_table gpt2-xl:8:base 70b:64:sam   # trace these, minutes each
python -m tests.bench.trace_table                             # the formula's column alone
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tram_ds.bench.trace import trace
from tram_ds.planning import plan

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
BEGIN, END = "<!-- traces -->\n", "<!-- /traces -->"
HEAD = [
    "| model | GPUs | row | traced GiB | planned GiB | planned / traced |",
    "|---|---:|---|---:|---:|---:|",
]
GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One cell: a model of planning/outline.py:CONFIGS on so many GPUs. traced: GiB."""

    model: str
    gpus: int
    row: str
    traced: float

    @property
    def planned(self) -> float:
        """GiB, by the formula of today."""
        return plan.published(self.model, self.gpus, self.row).memory.total / GIB

    def text(self) -> str:
        planned = self.planned
        return (
            f"| {self.model} | {self.gpus} | {self.row} | {self.traced:.2f} | {planned:.2f} | "
            f"{planned / self.traced:.3f} |"
        )


def lines(page: str) -> list[Line]:
    """Of the page's table."""
    table = page.partition(BEGIN)[2].partition(END)[0].splitlines()[len(HEAD) :]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [Line(c[0], int(c[1]), c[2], float(c[3])) for c in cells]


def drawn(page: str, table: list[Line]) -> str:
    """The page with this table."""
    before, _, rest = page.partition(BEGIN)
    text = "\n".join([*HEAD, *(line.text() for line in table)])
    return f"{before}{BEGIN}{text}\n{END}{rest.partition(END)[2]}"


def main(cells: list[str]) -> None:
    for cell in cells:
        model, gpus, row = cell.split(":")
        found = trace(plan.published_recipe(model, int(gpus), row), int(gpus))
        new = Line(model, int(gpus), row, round(found.total / GIB, 2))
        print(new.text(), flush=True)
        page = DOCUMENT.read_text()
        others = [x for x in lines(page) if (x.model, x.gpus, x.row) != (model, int(gpus), row)]
        DOCUMENT.write_text(drawn(page, [*others, new]))
    page = DOCUMENT.read_text()
    DOCUMENT.write_text(drawn(page, sorted(lines(page), key=_order)))


def _order(line: Line) -> tuple[int, int, int]:
    return (
        ("gpt2-xl", "llama3-8b", "70b").index(line.model),
        line.gpus,
        ("base", "sam", "tram_x", "tram_prev").index(line.row),
    )


if __name__ == "__main__":
    main(sys.argv[1:])

"""Blocks as text: for a terminal, Markdown, LaTeX (booktabs) and CSV. The same numbers in each."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tram_ds.comparison.blocks import Block, Cell

Format = Literal["terminal", "markdown", "latex", "csv"]
STYLES = {"best": "bold green", "worst": "red", "": ""}
SIGNS = {"best": " *", "worst": " !", "": "  "}  # so that marks survive without colour
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_LATEX |= {"±": r"$\pm$", "Δ": r"$\Delta$", "<": "$<$", ">": "$>$"}


def render(blocks: Sequence[Block], form: Format, colour: bool = False) -> str:
    """The blocks as one text. colour: with terminal escapes (form terminal only)."""
    if form == "csv":
        return _csv(blocks)
    one: dict[str, Callable[[Block], str]] = {"markdown": _markdown, "latex": _latex}
    return (
        "\n\n".join(_terminal(b, colour) if form == "terminal" else one[form](b) for b in blocks)
        + "\n"
    )


def _notes(block: Block, signs: str) -> list[str]:
    """signs: how best and worst look in this format."""
    legend = f"{signs}; {block.legend}" if block.marked else ""
    return [note for note in (legend, *block.notes) if note]


def _terminal(block: Block, colour: bool) -> str:
    table = Table()
    table.add_column(block.corner, no_wrap=True)
    for name in block.columns:
        table.add_column(name, justify="right", no_wrap=True)
    signed = {i for _, cells in block.rows for i, c in enumerate(cells) if c.mark}
    before = ""
    for label, cells in block.rows:
        if label.startswith("tram_") and before and not before.startswith("tram_"):
            table.add_section()
        # in a column with a mark every cell leaves room for one, so that digits stay in line
        texts = (c.text + (SIGNS[c.mark] if i in signed else "") for i, c in enumerate(cells))
        table.add_row(
            label, *(Text(text, style=STYLES[c.mark]) for text, c in zip(texts, cells, strict=True))
        )
        before = label
    # as wide as it needs: a terminal folds lines, and a column cut short would lose digits
    out = io.StringIO()
    console = Console(
        file=out,
        width=1000,
        force_terminal=colour,
        color_system="standard" if colour else None,
        markup=False,  # `[red]` in the name of a domain or a variant is its name
    )
    console.print(Text(block.title, style="bold"), table, sep="\n")
    lines = [line.rstrip() for line in out.getvalue().rstrip("\n").split("\n")]
    return "\n".join([*lines, *_notes(block, "* best, ! worst")])


def _markdown(block: Block) -> str:
    def plain(text: str) -> str:
        return text.replace("|", "\\|")

    def cell(c: Cell) -> str:
        text = plain(c.text)
        return {"best": f"**{text}**", "worst": f"_{text}_"}.get(c.mark, text)

    head = map(plain, [block.corner, *block.columns])
    lines = [f"### {block.title}", "", "| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * len(block.columns))
    lines += [
        "| " + " | ".join([plain(label), *map(cell, cells)]) + " |" for label, cells in block.rows
    ]
    notes = _notes(block, "**best**, _worst_")
    return "\n".join(lines + ([""] if notes else []) + [f"- {note}" for note in notes])


def _latex(block: Block) -> str:
    def escape(text: str) -> str:
        return "".join(_LATEX.get(c, c) for c in text)

    def cell(c: Cell) -> str:
        text = escape(c.text)
        return {"best": rf"\textbf{{{text}}}", "worst": rf"\underline{{{text}}}"}.get(c.mark, text)

    def row(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    lines = [r"\begin{table}", r"\centering\small", rf"\caption{{{escape(block.title)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(block.columns)}}}", r"\toprule"]
    lines += [row([escape(block.corner), *map(escape, block.columns)]), r"\midrule"]
    lines += [row([escape(label), *map(cell, cells)]) for label, cells in block.rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = _notes(block, "bold: best, underlined: worst")
    lines += [rf"\par {escape('; '.join(notes))}"] if notes else []
    return "\n".join([*lines, r"\end{table}"])


def _csv(blocks: Sequence[Block]) -> str:
    """One line per cell: table, block, row, column, value (a number at full precision, or empty),
    text, mark."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["title", "block", "row", "column", "value", "text", "mark"])
    for block in blocks:
        for label, cells in block.rows:
            for column, c in zip(block.columns, cells, strict=True):
                value = repr(float(c.value)) if math.isfinite(c.value) else ""
                writer.writerow([block.title, block.name, label, column, value, c.text, c.mark])
    return out.getvalue()

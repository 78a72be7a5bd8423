"""Each cell of ours in docs/comparison.md that says more than "no" names its tests, and these are
there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.ranks import ROOT

PAGE = (ROOT / "docs" / "comparison.md").read_text()
NAMED = re.compile(r"`(tests/[a-z_/0-9]+\.py)::(test_\w+)`")


def table(heading: str) -> dict[str, list[str]]:
    """Of the first table under the heading: the first cell of a row -> the others."""
    part = PAGE[PAGE.index(heading) :]
    rows = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)
    assert rows
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in rows[0].splitlines()[2:]]
    return {first: others for first, *others in cells}


def is_there(file: Path, name: str) -> bool:
    if not file.is_file():
        return False
    body = ast.parse(file.read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in body)


def test_every_test_that_is_named_is_there() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 20 and len(re.findall("::", PAGE)) == len(named)
    assert not [f"{f}::{name}" for f, name in named if not is_there(ROOT / f, name)]
    assert not is_there(ROOT / "tests/docs/test_comparison.py", "test_nothing")


def test_every_cell_of_ours_is_a_no_or_has_its_tests() -> None:
    ours = {name: cells[0] for name, cells in table("# Beside").items()}
    shown = table("## The tests of our column")
    assert {name for name, cell in ours.items() if cell != "no"} == shown.keys()
    assert all(NAMED.search(cells[0]) for cells in shown.values())
    assert all(len(cells) == 7 for cells in table("# Beside").values())

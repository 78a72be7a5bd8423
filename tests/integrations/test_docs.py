"""docs/trainers.md shows the scripts that the tests run, and what a user changes in each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.py"))


def test_the_page_shows_the_tested_scripts_and_no_others() -> None:
    shown = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert sorted(shown) == sorted(path.read_text() for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_at_most_three_lines_of_a_script_are_ours(path: Path) -> None:
    ours = re.findall(r"^.*(?:tram_ds|Tram|algorithm=).*$", path.read_text(), flags=re.MULTILINE)
    assert 0 < len(ours) <= 3, ours

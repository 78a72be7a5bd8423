"""docs/wrap.md shows the step that the tests compare with."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from tests.wrap import hand

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "wrap.md").read_text(encoding="utf-8")


def test_the_step_by_hand_is_the_one_of_these_tests() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert shown == inspect.getsource(hand.sam_step)
    assert len(shown.splitlines()) <= 25

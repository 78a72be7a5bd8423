"""Which weights a run is judged by, and what results.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tram_ds.evaluation.evaluator import Evaluator
from tram_ds.runtime.run_layout import RunFolder


@pytest.mark.parametrize(
    "select, best, expected",
    [
        ("final", False, {"step": 7}),
        ("best", True, {"step": 4, "validation_loss": 1.5}),
        ("best", False, {"step": 7, "why": "no validation loss was finite"}),
    ],
)
def test_the_selected_weights_are_named(
    tmp_path: Path, select: str, best: bool, expected: dict[str, Any]
) -> None:
    recipe: Any = SimpleNamespace(eval=SimpleNamespace(select=select))
    engine: Any = SimpleNamespace(steps=7, rank=0)
    if best:
        (tmp_path / "best.json").write_text(json.dumps(expected))
    selected = Evaluator(recipe, None, engine, RunFolder(tmp_path))._selected(best)
    assert selected.pop("why", "").startswith(expected.pop("why", ""))
    assert selected == expected

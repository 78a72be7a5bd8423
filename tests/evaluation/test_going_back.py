"""A run that goes back to an older checkpoint: what was measured on the way it left does not count
any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tram_ds.evaluation.selection import Selection
from tram_ds.runtime.run_layout import RunFolder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of 9 steps, whose best weights were those of step 6."""
    for folder in ("best", "export"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").touch()
    (tmp_path / "best.json").write_text('{"step": 6, "validation_loss": 1.0}')
    (tmp_path / "results.json").write_text('{"selected": {"step": 6, "validation_loss": 1.0}}')
    (tmp_path / "rows.npz").touch()
    return tmp_path


def go_back(run_dir: Path, step: int, total: int) -> list[str]:
    wanted: Any = None
    Selection(wanted, RunFolder(run_dir)).go_back_to(step, total)
    return sorted(path.name for path in run_dir.iterdir())


def test_the_best_of_a_way_that_was_left_is_dropped(run_dir: Path, capsys) -> None:
    assert go_back(run_dir, 4, 9) == []
    assert "step 6: dropped" in capsys.readouterr().out


def test_the_best_so_far_is_kept_and_the_results_of_an_end_that_is_none_are_not(
    run_dir: Path,
) -> None:
    assert go_back(run_dir, 6, 20) == ["best", "best.json", "export"]
    assert json.loads((run_dir / "best.json").read_text())["step"] == 6


def test_at_the_end_nothing_is_dropped(run_dir: Path) -> None:
    assert go_back(run_dir, 9, 9) == ["best", "best.json", "export", "results.json", "rows.npz"]


def test_a_strangers_file_in_what_is_dropped_stays(run_dir: Path) -> None:
    (run_dir / "best" / "notes.txt").touch()
    assert go_back(run_dir, 4, 9) == ["best"]

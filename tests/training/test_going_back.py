"""Which resumes take another way than the one recorded, so that its steps will not come again as
they were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tram_ds.checkpoint.resume import Resumed
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.training import run as training
from tram_ds.training.early_stopping import EarlyStopping


@pytest.mark.parametrize(
    ("refused", "changes", "another"),
    [
        ([], [], False),  # killed between two saves: the same steps again, bit for bit
        ([], ["optimizer.lr: 1e-05 -> 2e-05"], True),
        (["step-00000008: damaged"], [], True),
        (None, None, False),  # no checkpoint
    ],
)
def test_a_changed_recipe_and_a_damaged_checkpoint_make_another_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Any, changes: Any, another: bool
) -> None:
    found = None if refused is None else Resumed(tmp_path / "step-00000006", {}, refused, changes)
    monkeypatch.setattr(training, "resume", lambda *_, **__: found)
    monkeypatch.setattr(training, "to_dict", lambda _: {})
    run: Any = SimpleNamespace(
        stepper=SimpleNamespace(steps=6),
        folder=RunFolder(tmp_path),
        recipe=None,
        task=SimpleNamespace(data_digest=lambda: "0"),
        rows=[],
        request=SimpleNamespace(allow_change=True, fallback=True),
        total_steps=10,
        evaluator=SimpleNamespace(selection=SimpleNamespace(go_back_to=lambda *_: None)),
        early_stopping=EarlyStopping(None, "validation_loss"),
        job=SimpleNamespace(rank=0),
    )
    assert training.go_on(run) is another

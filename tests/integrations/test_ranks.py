"""The page's scripts on 2 ranks are the plain loop over DistributedDataParallel, and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ranks

SCRIPTS = {  # 22 rows on 2 ranks: 6 micro-batches each, 3 steps an epoch
    "hf_trainer": ("DistributedDataParallel", 3),
    "accelerate_loop": ("DistributedDataParallel", 3),
    "lightning_fit": ("DDPStrategy", 6),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_are_the_plain_loop_too(script: str, tmp_path: Path) -> None:
    wrapped, steps = SCRIPTS[script]
    found = ranks.run("tests.integrations.ddp_worker", script, str(tmp_path / "run"))
    assert found.pop("gap") <= 1e-7
    assert found == {
        "wrapped": wrapped,
        "windows": [2] * steps,
        "resumed": True,
        "apart": 0.0,
    }

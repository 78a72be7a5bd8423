"""The page's scripts on 2 ranks are the plain loop over DistributedDataParallel, and resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ranks


@pytest.mark.parametrize("script", ["hf_trainer", "accelerate_loop"])
def test_two_ranks_are_the_plain_loop_too(script: str, tmp_path: Path) -> None:
    """22 rows on 2 ranks: 6 micro-batches each (the last filled up), 3 steps."""
    found = ranks.run("tests.integrations.ddp_worker", script, str(tmp_path / "run"))
    assert found.pop("gap") <= 1e-7
    assert found == {
        "wrapped": "DistributedDataParallel",
        "windows": [2, 2, 2],
        "resumed": True,
        "apart": 0.0,
    }

"""The page's scripts on 2 ranks are the plain loop over DistributedDataParallel or FSDP2, and
resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import ranks

SCRIPTS = {  # 22 rows on 2 ranks: 6 micro-batches each, 3 steps an epoch
    "hf_trainer": ("DistributedDataParallel", 2, 3),
    "accelerate_loop": ("DistributedDataParallel", 2, 3),
    "lightning_fit": ("DDPStrategy", 3, 6),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_are_the_plain_loop_too(script: str, tmp_path: Path) -> None:
    wrapped, saved, steps = SCRIPTS[script]
    found = ranks.run("tests.integrations.ddp_worker", script, str(tmp_path / "run"))
    assert found.pop("gap") <= 1e-7
    assert found == {
        "wrapped": wrapped,
        "windows": [2] * steps,
        "resumed": True,
        "taken": list(range(saved, steps)),
        "apart": 0.0,
    }


@pytest.fixture(scope="module")
def under_fsdp2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks.run("tests.integrations.fsdp2_worker", str(tmp_path_factory.mktemp("runs")))


CASES = (
    "accelerate",
    "Trainer, sharded files",
    "Trainer, whole files",
    "Trainer, bf16",
    "Trainer, recomputed",
)


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_is_the_plain_loop_too(case: str, under_fsdp2: dict[str, Any]) -> None:
    found = dict(under_fsdp2[case])
    assert found.pop("gap") <= 1e-7
    lost = found.pop("lost")
    assert lost[0] == lost[1], "a refusal on one rank would hang the other"
    assert "has no tram-00001-of-00002.safetensors" in lost[0]
    assert found == {
        "wrapped": "FSDPGPT2LMHeadModel",
        "windows": [2] * 3,
        "resumed": True,
        "taken": [2],
        "apart": 0.0,
        "files": [f"tram-0000{rank}-of-00002.safetensors" for rank in range(2)],
    }

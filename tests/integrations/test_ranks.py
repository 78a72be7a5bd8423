"""The page's scripts on 2 ranks are the plain loop over DistributedDataParallel, FSDP2 or
DeepSpeed, and resume."""

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


def test_a_damaged_file_of_one_rank_is_refused_on_all(under_fsdp2: dict[str, Any]) -> None:
    expected = {
        "by something else": "cannot be read (it does not say of which step of TRAM it is)",
        "of nothing": "cannot be read (what it says of its run is damaged, algorithm: ",
        "cut": "cannot be read (Error while deserializing header: ",
        "of the step before": "is of step 2 for rank 0, and ",
    }
    found = dict(under_fsdp2["damaged"])
    assert found.pop("whole") == ["", ""]
    assert found.keys() == expected.keys()
    for name, lines in found.items():
        assert lines[0] == lines[1] and "\n" not in lines[0], "one alone would hang the other"
        assert "tram-00001-of-00002.safetensors" in lines[0] and expected[name] in lines[0]
        assert lines[0].endswith("resume from an earlier checkpoint of the run")


def test_another_loss_on_one_rank_is_refused_on_all(under_fsdp2: dict[str, Any]) -> None:
    first, second = under_fsdp2["another loss"]
    assert first == second and first.startswith("the model's own loss is ")


@pytest.fixture(scope="module")
def under_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks.run("tests.integrations.zero_worker", str(tmp_path_factory.mktemp("runs")))


FP32 = ("accelerate, stage 1", "Trainer, stage 2, offloaded", "Trainer, stage 3")
OF_DEEPSPEED = (  # bf16, or an optimizer of the config: beside deepspeed.initialize, bit for bit
    "accelerate, stage 2, optimizer of the config",
    "Trainer, stage 1, bf16 summed in fp32",
    "Trainer, stage 3, bf16, both of the config",
)


@pytest.mark.parametrize("case", FP32 + OF_DEEPSPEED)
def test_deepspeed_is_the_plain_loop_too(case: str, under_deepspeed: dict[str, Any]) -> None:
    found = dict(under_deepspeed[case])
    assert found.pop("gap") <= (1e-6 if case in FP32 else 0.0)
    expected = {
        "wrapped": "DeepSpeedEngine",
        "windows": [2] * 3,
        "resumed": True,
        "taken": [2],
        "apart": 0.0,
    }
    if case == "Trainer, stage 3":
        lost = found.pop("lost")
        assert lost[0] == lost[1], "a refusal on one rank would hang the other"
        assert "has no tram-00001-of-00002.safetensors" in lost[0]
        assert "optimizer.weight_decay: 0.0 -> 0.1" in found.pop("another")
        expected["files"] = [f"tram-0000{rank}-of-00002.safetensors" for rank in range(2)]
    assert found == expected


def test_no_scheduler_of_deepspeed_moves_after_a_skipped_step(
    under_deepspeed: dict[str, Any],
) -> None:
    """A prepared scheduler moves once for every rank: two halvings."""
    for kind, rates in under_deepspeed["a step that is not finite"].items():
        assert rates == pytest.approx([0.1, 0.1, 0.025]), kind


def test_an_engine_that_cannot_be_trained_right_is_refused(
    under_deepspeed: dict[str, Any],
) -> None:
    said = "zero_optimization.round_robin_gradients = true is refused: it makes DeepSpeed address "
    assert under_deepspeed["refused"].startswith(said)

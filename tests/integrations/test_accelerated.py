"""A loop of accelerate's with AcceleratedStepper is the plain loop with wrap()."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType

from tests.integrations.plain import equal, factor, made, ran
from tests.wrap.hand import batches, forward, mlp, sgd
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations import AcceleratedStepper, causal_lm
from tram_ds.integrations.deepspeed_plugin import clip_norm, set_clip_norm
from tram_ds.integrations.refusals import refuse_accelerator, refuse_recomputation

SCRIPT = Path(__file__).parent / "examples" / "accelerate_loop.py"


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """accelerate keeps one state a process; earlier tests may have made another."""
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_script_is_the_plain_loop_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(SCRIPT, tmp_path / "saved", monkeypatch=monkeypatch)
    model, rows = made(use_cache=True)  # which only Trainer turns off
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stepper = wrap(model, optimizer, "tram_prev", clip_norm=0.5, schedule=factor)
    data = [torch.stack([row["input_ids"] for row in rows[at : at + 2]]) for at in range(0, 22, 2)]
    micro = [{"input_ids": ids, "labels": ids} for ids in data]
    for at in range(0, len(micro), 2):
        stepper.step(micro[at : at + 2], causal_lm)
    assert equal(whole["model"], model)
    assert whole["stepper"].stepper.steps == whole["scheduler"].scheduler.last_epoch == 6
    assert {int(s["step"]) for s in whole["optimizer"].state.values()} == {6}

    resumed = ran(SCRIPT, tmp_path / "again", tmp_path / "saved", monkeypatch=monkeypatch)
    assert equal(resumed["model"], model)


def prepared(**options: Any) -> tuple[Accelerator, Any, Any]:
    accelerator, model = Accelerator(cpu=True, **options), mlp()
    return accelerator, *accelerator.prepare(model, sgd(model))


def test_a_step_that_is_not_finite_moves_no_scheduler() -> None:
    accelerator, model, optimizer = prepared()
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    stepper = AcceleratedStepper(accelerator, model, optimizer, "sam", rho=0.1)
    (batch,) = batches(1)
    for poison, rate in ((float("nan"), 0.1), (1.0, 0.05)):
        with accelerator.accumulate(model):
            report = stepper.step((batch[0] * poison, batch[1]), forward)
            scheduler.step()
        assert report is not None and report.skipped == (poison != 1.0)
        assert scheduler.get_last_lr() == [rate]


def test_a_state_of_before_the_first_step_is_continued(tmp_path: Path) -> None:
    """Nothing is remembered yet."""
    accelerator, model, optimizer = prepared()
    stepper = AcceleratedStepper(accelerator, model, optimizer, "tram_prev").stepper
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    assert stepper.steps == 0


def test_what_cannot_go_together_is_refused(tmp_path: Path) -> None:
    accelerator, model, optimizer = prepared()
    with pytest.raises(ValueError, match="SGD was not prepared by this accelerator"):
        AcceleratedStepper(accelerator, model, optimizer.optimizer)
    AcceleratedStepper(accelerator, model, optimizer)
    with pytest.raises(ValueError, match="a second AcceleratedStepper"):
        AcceleratedStepper(accelerator, model, optimizer)
    with pytest.raises(ValueError, match=r"has no tram\.safetensors"):
        accelerator.load_state(str(tmp_path))


def plugin(**told: Any) -> SimpleNamespace:
    """accelerate's, by the last word of a key."""
    return SimpleNamespace(
        get_value=lambda key, default=None: told.get(key.split(".")[-1], default)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "^fsdp: FSDP1 .*use FSDP2"),
        ({"deepspeed_plugin": plugin()}, "^deepspeed: zero_optimization.stage 0 .*use stage 1, 2"),
        (
            {"deepspeed_plugin": plugin(stage=2, autotp_size=2)},
            r"^deepspeed: tensor_parallel\.autotp_size 2: ",
        ),
        ({"parallelism_config": object()}, "^parallelism_config: "),
        ({"mixed_precision": "fp16"}, "^mixed precision fp16: .*use bf16"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "^MEGATRON_LM: "),
    ],
)
def test_a_way_to_train_that_is_no_ddp_is_refused(change: dict[str, Any], message: str) -> None:
    there = {"mixed_precision": "no", "distributed_type": DistributedType.MULTI_GPU}
    now = SimpleNamespace(**(there | change))
    now.state = now
    with pytest.raises(ValueError, match=message):
        refuse_accelerator(now)


def test_recomputation_with_other_masks_is_refused() -> None:
    plugin = SimpleNamespace(fsdp_version=2, activation_checkpointing=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    model = mlp(torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"other dropout masks .*gradient_checkpointing=True"):
        refuse_recomputation(accelerator, model)
    refuse_recomputation(accelerator, model.eval())  # it draws none
    refuse_recomputation(accelerator, mlp())
    plugin.activation_checkpointing = False
    refuse_recomputation(accelerator, model.train())


def test_fsdp_that_accelerate_would_leave_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # accelerate launch --use_fsdp, on a CPU
    accelerator, model, optimizer = prepared()
    with pytest.raises(ValueError, match=r"^fsdp: accelerate shards over .*leave fsdp out"):
        AcceleratedStepper(accelerator, model, optimizer)


def test_deepspeed_that_accelerate_would_leave_out_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator, model, optimizer = prepared()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # its plugin sets it, on a CPU too
    with pytest.raises(ValueError, match=r"^deepspeed: accelerate runs it on .*leave deepspeed"):
        AcceleratedStepper(accelerator, model, optimizer)


@pytest.mark.parametrize(
    ("asked", "told", "clips"),
    [(None, 0.5, None), (0.5, None, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.5)],
)
def test_the_norm_is_clipped_as_deepspeed_or_the_user_says(
    asked: float | None, told: float | None, clips: float | None
) -> None:
    state = SimpleNamespace(deepspeed_plugin=plugin(gradient_clipping=told))
    assert clip_norm(SimpleNamespace(state=state), asked) == clips


def test_two_norms_to_clip_to_are_refused() -> None:
    state = SimpleNamespace(deepspeed_plugin=plugin(gradient_clipping=1.0))
    with pytest.raises(ValueError, match=r"clip_norm 0\.5 and gradient_clipping 1\.0 .*leave clip"):
        clip_norm(SimpleNamespace(state=state), 0.5)


@pytest.mark.parametrize(("config", "clips"), [({}, 0.0), ({"gradient_clipping": 0.5}, 0.5)])
def test_no_clipping_is_told_to_deepspeed(config: dict[str, float], clips: float) -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    set_clip_norm(SimpleNamespace(state=state), 0.0)
    assert config == {"gradient_clipping": clips}

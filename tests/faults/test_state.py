"""What may be saved and what may be continued: displaced weights, missing references, other models,
changed recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.faults.jobs import RECIPE, stepper, train, trained
from tests.parity import build, problem
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.checkpoint import files
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.checkpoint.resume import Saver
from tram_ds.runtime.exits import CheckpointError

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def test_no_checkpoint_of_displaced_weights_nor_after_a_failed_step(run_dir: Path) -> None:
    built = stepper("single", "tram_prev", 1, micros=1)
    checkpoint.resume(built, run_dir)
    with Saver(run_dir, built) as saver:
        with built.engine.moved(to=built.engine.params() * 2.0):
            with pytest.raises(CheckpointError, match="displaced"):
                saver.save()
            with pytest.raises(CheckpointError, match="displaced"):
                checkpoint.resume(built, run_dir)
        built.recovers = False  # as in a run of a recipe, which ends with the step that raised
        with pytest.raises(ZeroDivisionError):
            built.step([None], lambda *_: 1 // 0)
        with pytest.raises(CheckpointError, match="step 3 did not finish"):
            saver.save()
        built.recovers = True  # as wrap() makes it: the step has left nothing
        checkpoint.resume(built, run_dir)
        with pytest.raises(ZeroDivisionError):
            built.step([None], lambda *_: 1 // 0)
        train(built, 1, 1)
        saver.save()


def test_a_missing_reference_is_an_error_and_never_a_zero_distance(tmp_path: Path) -> None:
    base = stepper("single", "base", 1, micros=1)
    with Saver(tmp_path, base) as saver:
        at_zero = shutil.copytree(saver.save(), tmp_path / "zero")
        train(base, 1, 1)
        at_one = saver.save()
    for name, reference in (
        ("tram_prev", "previous"),
        ("tram_init", "initial"),
        ("mesa", "average"),
    ):
        built = stepper("single", name, 1, micros=1)
        with pytest.raises(
            CheckpointError, match=f"reference weights \\['{reference}'\\] that {name} measures"
        ):
            checkpoint.load(built, at_one)
        assert built.steps == 0
    built = stepper("single", "tram_prev", 1, micros=1)
    train(built, 2, 1)
    # before the first step there is no reference, and theta_{-1} is theta_0
    checkpoint.load(built, at_zero)
    assert built.steps == 0 and train(built, 1, 1) == train(
        stepper("single", "tram_prev", 1, micros=1), 1, 1
    )


def test_another_model_or_optimizer_is_refused(run_dir: Path) -> None:
    newest = run_dir / "checkpoints/step-00000002"
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(
        CheckpointError,
        match=r"another model: .*attn.c_proj.weight is not in the model.* and \d+ more",
    ):
        checkpoint.load(wrap(model, torch.optim.AdamW(model.parameters()), "base"), newest)
    with pytest.raises(
        CheckpointError,
        match=r"continues from no moments, the checkpoint holds \['exp_avg', 'exp_avg_sq'\]",
    ):
        checkpoint.load(build.stepper("single", problem.model(), "tram_prev", 1), newest)


def test_a_changed_recipe_is_listed_and_refused(run_dir: Path) -> None:
    built = stepper("single", "tram_prev", 1, micros=1)
    free = {
        "tracking": {"uri": "x"},
        "run_dir": "y",
        "engine": {"name": "zero"},
        "checkpoint": {"keep": 9},
        "eval": {},
    }
    now = RECIPE | free | {"optimizer": {"name": "adamw", "lr": 0.1, "betas": (0.9, 0.95)}}
    now["train"] = RECIPE["train"] | {"micro_batch": 2, "stop_after": 4}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.resume(built, run_dir, recipe=now, data="rows-b")
    for line in (
        "optimizer.lr: 0.003 -> 0.1",
        "optimizer.betas: [0.9, 0.99] -> [0.9, 0.95]",  # then not written: the default
        "train.micro_batch: 1 -> 2",
        "data: 'rows-a' -> 'rows-b'",
    ):
        assert line in str(caught.value)
    assert "tracking" not in str(caught.value) and built.steps == 0
    found = checkpoint.resume(built, run_dir, recipe=now, data="rows-b", allow_change=True)
    assert found is not None and len(found.changes) == 4
    assert checkpoint.resume(built, run_dir, recipe=RECIPE | free, data="rows-a") is not None
    built.seed = 6
    with pytest.raises(CheckpointError, match="seed: 5 -> 6"):
        checkpoint.resume(built, run_dir)


def test_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-in-the-environment")
    recipe = {
        "tracking": {"uri": "https://user:canary-in-url@host"},
        "model": {"path": "x/canary-in-the-environment"},
    }
    with Saver(tmp_path, trained()[0], recipe=recipe) as saver:
        path = saver.save()
    assert not [p for p in path.iterdir() if b"canary" in p.read_bytes()]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


def test_running_statistics_are_part_of_the_state(tmp_path: Path) -> None:
    def build() -> Stepper:
        torch.manual_seed(1)
        model = Normed()
        return wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "asam")

    def forward(m: nn.Module, x: torch.Tensor) -> Any:
        y = m(x)
        return y.square().sum(), len(x), y

    built, x = build(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    built.step([x], forward)
    with Saver(tmp_path, built) as saver:
        saver.save()
    checkpoint.resume(other := build(), tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(built.engine.module.buffers(), other.engine.module.buffers(), strict=True)
    )
    assert built.step([x], forward).loss == other.step([x], forward).loss
    assert built.engine.params().equal(other.engine.params())


def test_background_errors_surface_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = stepper("single", "sam", 1, micros=1)
    with Saver(tmp_path, built) as saver:
        first = saver.save(asynchronous=True)
        train(built, 1, 1)
        second = saver.save(asynchronous=True)  # waits for the first
        assert checkpoint.verify(first)["step"] == 0
        saver.wait()
        assert checkpoint.verify(second)["step"] == 1

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        train(built, 1, 1)
        with monkeypatch.context() as patch:
            patch.setattr(files, "commit", fail)
            saver.save(asynchronous=True)
            with pytest.raises(
                CheckpointError,
                match=r"saving step 2 .*No space left.*newest checkpoint is .*step-00000001",
            ):
                saver.save(asynchronous=True)
        assert saver.save().name == "step-00000002"

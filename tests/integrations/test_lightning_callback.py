"""Lightning's Trainer with TramCallback is the plain loop with wrap()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.plain import equal, factor, made, ran
from tests.wrap.hand import batches, forward, mlp
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations import causal_lm

L = pytest.importorskip("lightning", reason="lightning is not installed")

SCRIPT = Path(__file__).parent / "examples" / "lightning_fit.py"
STEPS = 12  # two epochs of 6


def test_the_script_is_the_plain_loop_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(SCRIPT, tmp_path, monkeypatch=monkeypatch)
    model, rows = made(use_cache=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stepper = wrap(
        model, optimizer, "tram_prev", clip_norm=0.5, schedule=lambda step: factor(step, STEPS)
    )
    data = [torch.stack([row["input_ids"] for row in rows[at : at + 2]]) for at in range(0, 22, 2)]
    micro = [{"input_ids": ids, "labels": ids} for ids in data]
    for _ in range(2):
        for at in range(0, len(micro), 2):
            report = stepper.step(micro[at : at + 2], causal_lm)
    trainer = whole["trainer"]
    assert equal(whole["model"].gpt2, model)
    assert trainer.global_step == STEPS
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == STEPS
    assert {int(s["step"]) for s in trainer.optimizers[0].state.values()} == {STEPS}
    for name in ("loss", "distance", "radius", "grad_norm"):
        told = float(trainer.callback_metrics[f"tram/{name}"])
        assert told == pytest.approx(float(getattr(report, name)), rel=1e-6), name
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=12.ckpt", "step=6.ckpt"]

    resumed = ran(SCRIPT, tmp_path / "again", tmp_path / "step=6.ckpt", monkeypatch=monkeypatch)
    assert resumed["trainer"].global_step == STEPS
    assert equal(resumed["model"], whole["model"])


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Any) -> Any:
        return self.mlp(x)

    def training_step(self, batch: Any, _: int) -> Any:
        loss, count, _ = forward(self, batch)
        return loss / count

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Clips(Plain):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        return None


def loader(data: Any) -> Any:
    """A list would be several loaders to Lightning."""
    return torch.utils.data.DataLoader(data, batch_size=None)


def fitted(folder: Path, module: Any, callback: Any, data: Any = None, **options: Any) -> Any:
    shown = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[callback],
        enable_checkpointing=False,
        **shown | options,
    )
    trainer.fit(module, loader(data or batches(2)))
    return trainer


def callback(**options: Any) -> Any:
    from tram_ds.integrations import TramCallback

    return TramCallback("sam", forward, rho=0.1, **options)


def test_a_fit_leaves_the_module_as_it_was_and_a_later_one_begins_anew(tmp_path: Path) -> None:
    module, ours = Plain(), callback()
    trainer = fitted(tmp_path, module, ours)
    assert trainer.global_step == ours.stepper.steps == 2
    assert "training_step" not in vars(module) and "optimizer_step" not in vars(module)
    assert fitted(tmp_path, module, ours).global_step == ours.stepper.steps == 2


def test_a_step_that_is_not_finite_is_said(tmp_path: Path) -> None:
    module, (batch,) = Plain(), batches(1)
    before = [p.clone() for p in module.parameters()]
    trainer = fitted(tmp_path, module, callback(), [(batch[0] * float("nan"), batch[1])])
    assert float(trainer.callback_metrics["tram/skipped_steps"]) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Manual, {}, "automatic_optimization = False"),
        (Clips, {}, "configure_gradient_clipping of Clips would not be called"),
        (Plain, {"precision": "bf16-true"}, "precision bf16-true: use 32-true, or bf16-mixed"),
        (
            Plain,
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            "gradient_clip_algorithm value",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(
    tmp_path: Path, module: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, module(), callback(), **options)


def test_a_forward_is_needed_and_a_resume_of_another_run_is_refused(tmp_path: Path) -> None:
    from tram_ds.integrations import TramCallback

    with pytest.raises(ValueError, match="TramCallback needs forward="):
        TramCallback("sam")
    other = fitted(tmp_path, Plain(), TramCallback("asam", forward))
    other.save_checkpoint(tmp_path / "asam.ckpt")
    with pytest.raises(ValueError, match=r"algorithm\.name: 'asam' -> 'sam'"):
        resumed(tmp_path / "asam.ckpt")
    plain = fitted(tmp_path, Plain(), L.pytorch.Callback())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="fit continues at step 2 and nothing was loaded"):
        resumed(tmp_path / "plain.ckpt")


def resumed(checkpoint: Path) -> None:
    trainer = L.Trainer(
        max_epochs=2, callbacks=[callback()], logger=False, default_root_dir=checkpoint.parent
    )
    trainer.fit(Plain(), loader(batches(2)), ckpt_path=str(checkpoint))

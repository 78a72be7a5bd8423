"""TramTrainer is the loop by hand with wrap(): one step a window, clipped, scheduled, resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from tests.integrations.plain import STEPS, equal, factor, made, ran
from tests.wrap.hand import sam_step
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations import TramTrainer, causal_lm

SCRIPT = Path(__file__).parent / "examples" / "hf_trainer.py"
ALGORITHM = {"name": "tram_prev", "radius_scale": 10.0}


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The batches of every step that Trainer reads from now on."""
    found: list[list[Any]] = []
    read = Trainer.get_batch_samples

    def noted(self: Trainer, *arguments: Any) -> Any:
        samples = read(self, *arguments)
        found.append(samples[0])
        return samples

    monkeypatch.setattr(Trainer, "get_batch_samples", noted)
    return found


def trained(
    folder: Path,
    algorithm: Any = "sam",
    config: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    **arguments: Any,
) -> TramTrainer:
    model, rows = made(**(config or {}))
    shared = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    told = TrainingArguments(str(folder), **shared | arguments)
    return TramTrainer(
        model=model, args=told, train_dataset=rows, algorithm=algorithm, **(more or {})
    )


def test_the_script_is_the_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: list[list[Any]]
) -> None:
    found = ran(SCRIPT, tmp_path, monkeypatch=monkeypatch)
    trainer = found["trainer"]
    model, _ = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    stepper = wrap(model, optimizer, ALGORITHM, seed=42, clip_norm=0.5, schedule=factor)
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [len(window) for window in windows] == [2, 2, 2, 2, 2, 1]
    assert trainer.state.global_step == STEPS
    for step, (window, entry) in enumerate(zip(windows, logged, strict=True)):
        report = stepper.step(window, causal_lm)
        assert entry["loss"] == pytest.approx(float(report.loss), rel=1e-6)
        for name in ("distance", "radius", "perturbed_loss", "grad_norm"):
            assert entry[name] == float(getattr(report, name)), name
        assert entry["learning_rate"] == pytest.approx(1e-2 * factor(step))
        assert entry["skipped_steps"] == 0
        assert entry["perturbation_norm"] > 0 and entry["radius"] == 10 * entry["distance"]
    assert equal(found["model"], model)
    assert trainer.lr_scheduler.last_epoch == STEPS
    steps = {int(s["step"]) for s in trainer.optimizer.state.values()}
    assert steps == {STEPS}, "an optimizer step a window, not one a micro-batch"


def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(SCRIPT, tmp_path / "whole", monkeypatch=monkeypatch)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = ran(SCRIPT, tmp_path / "resumed", checkpoint, monkeypatch=monkeypatch)
    assert equal(resumed["model"], whole["model"])
    first, second = (x["trainer"].state.log_history[2:6] for x in (whole, resumed))
    for before, after in zip(first, second, strict=True):
        assert before == after and before["distance"] > 0

    (checkpoint / "tram.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no tram\.safetensors"):
        ran(SCRIPT, tmp_path / "again", checkpoint, monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trained(folder, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "asam"}, r"algorithm\.name: 'sam' -> 'asam'"),
        ({"algorithm": {"name": "sam", "rho": 0.2}}, r"algorithm\.rho: None -> 0\.2"),
        ({"seed": 1}, "seed: 42 -> 1"),
        ({"max_grad_norm": 0.1}, r"clip_norm: 1\.0 -> 0\.1"),
        # of these Trainer itself would take the checkpoint's, without a word
        (
            {"weight_decay": 0.1, "learning_rate": 1e-3},
            r"optimizer\.lr: 5e-05 -> 0\.001; optimizer\.weight_decay: 0\.0 -> 0\.1",
        ),
        ({"optim": "sgd"}, r"\(optimizer: AdamW -> SGD\)"),
    ],
)
def test_a_resume_as_another_run_is_refused(
    tmp_path: Path, checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, max_steps=2, **change).train(str(checkpoint))


def test_it_is_the_step_by_hand_in_plain_torch(tmp_path: Path, windows: list[list[Any]]) -> None:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    trainer = trained(
        tmp_path,
        {"name": "sam", "rho": 0.1},
        still,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=2,
        **arguments,
    )
    trainer.train()
    model, _ = made(**still)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def forward(model: Any, batch: Any) -> tuple[torch.Tensor, int, None]:
        count = int((batch["labels"][:, 1:] != -100).sum())
        return model(**batch).loss * count, count, None

    for window in windows:
        sam_step(model, optimizer, window, forward, rho=0.1)
    pairs = zip(trainer.model.parameters(), model.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-6


def test_a_step_that_is_not_finite_is_no_step(tmp_path: Path) -> None:
    calls: list[int] = []

    def forward(model: Any, batch: Any) -> Any:
        found = causal_lm(model, batch)
        calls.append(1)
        bad = float("nan") if len(calls) <= 2 else 1.0  # both passes of the first step
        return found.loss_sum * bad, found.count, found.logits

    trainer = trained(
        tmp_path, more={"forward": forward}, max_steps=2, logging_steps=1, learning_rate=0.1
    )
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == 1  # type: ignore[union-attr]
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {1}  # type: ignore[union-attr]
    assert [e["skipped_steps"] for e in trainer.state.log_history[:2]] == [1.0, 1.0]


def test_a_second_train_begins_anew(tmp_path: Path) -> None:
    trainer = trained(tmp_path, "tram_init", max_steps=1)
    trainer.train()
    first = trainer.stepper
    trainer.train()
    assert trainer.stepper is not first and trainer.stepper is not None
    assert trainer.stepper.steps == 1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "auto batch": ({"auto_find_batch_size": True}, {}, "auto_find_batch_size"),
    "neftune": ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha.*tram_x"),
    "cache": ({"torch_empty_cache_steps": 1}, {}, "torch_empty_cache_steps"),
    "smoothing": ({"label_smoothing_factor": 0.1}, {}, r"label_smoothing_factor 0\.1.*forward="),
    "loss": ({}, {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func.*forward="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_together_is_refused(tmp_path: Path, case: str) -> None:
    arguments, more, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, more=more, **arguments)


def other_loss(model: GPT2LMHeadModel) -> None:
    model.loss_function = lambda logits, labels, **_: logits.square().mean()  # type: ignore[assignment]


def bfloat16(model: GPT2LMHeadModel) -> None:
    model.bfloat16()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(other_loss, "the model's own loss is"), (bfloat16, "float32")],
)
def test_a_model_that_would_train_wrong_is_refused_before_the_first_step(
    tmp_path: Path, spoil: Callable[[GPT2LMHeadModel], None], message: str
) -> None:
    trainer = trained(tmp_path, max_steps=1)
    assert isinstance(trainer.model, GPT2LMHeadModel)
    spoil(trainer.model)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer.train()
    now = trainer.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path: Path) -> None:
    trainer = trained(tmp_path, "tram_prev", max_steps=2, bf16=True, learning_rate=1e-2)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    for a, b in zip(before, trainer.model.parameters(), strict=True):
        assert b.dtype == torch.float32 and not torch.equal(a, b)

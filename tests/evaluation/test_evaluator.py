"""Which weights a run is judged by, and what results.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.parity import problem
from tram_ds import wrap
from tram_ds.algorithms.references import average
from tram_ds.checkpoint.export import read_export
from tram_ds.evaluation.candidates import Candidate
from tram_ds.evaluation.evaluator import Evaluator
from tram_ds.evaluation.models import score_all
from tram_ds.evaluation.selection import Selection
from tram_ds.recipe.loading import load
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.run_layout import RunFolder


@pytest.mark.parametrize(
    "select, best, expected",
    [
        ("final", False, {"step": 7}),
        ("best", True, {"step": 4, "validation_loss": 1.5}),
        ("best", False, {"step": 7, "why": "no validation_loss was finite"}),
    ],
)
def test_the_selected_weights_are_named(
    tmp_path: Path, select: str, best: bool, expected: dict[str, Any]
) -> None:
    scored: Any = SimpleNamespace(select=select, weights="last", key="validation_loss")
    if best:
        (tmp_path / "best.json").write_text(json.dumps(expected))
    selected = Selection(scored, RunFolder(tmp_path)).selected(best, steps=7)
    assert selected.pop("why", "").startswith(expected.pop("why", ""))
    assert selected == expected


def recipe_of(weights: str, key: str = "validation_loss") -> Any:
    words = ["algorithm=mesa", "eval.select=best", "eval.every_steps=1", f"eval.weights={weights}"]
    found = load("quickstart", words)
    return found.model_copy(update={"eval": found.eval.model_copy(update={"key": key})})


def test_the_average_is_scored_and_exported_and_theta_stays(tmp_path: Path) -> None:
    """After theta_0, theta_1, theta_2 and decay .7: .49 theta_0 + .21 theta_1 + .3 theta_2."""
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.LR)
    built = wrap(model, optimizer, "mesa", decay=0.7, weight=2.0)
    engine = built.engine
    thetas = [engine.params().clone()]
    for batches in problem.global_batches(2, 1):
        built.step(batches, problem.forward, problem.counts)
        thetas.append(engine.params().clone())
    want = thetas[0] * 0.49 + thetas[1] * 0.21 + thetas[2] * 0.3
    task = SimpleNamespace(
        train_domains=["home"],
        classification=False,
        data_digest=lambda: "0" * 64,
        contents=dict,
    )
    judge = Evaluator(
        recipe_of("ema"),
        task,
        engine,
        RunFolder(tmp_path),
        judged=lambda: average(built.algorithm, engine),
    )
    with judge._at(judge.judged()):
        scored = engine.working().realise()
    judge.keep_if_best(2, 1.5)
    exported = read_export(engine, RunFolder(tmp_path).best)
    assert exported.equal(scored) and not exported.equal(thetas[2])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(exported, want, strict=True))
    assert engine.params().equal(thetas[2])
    card = (RunFolder(tmp_path).best / "README.md").read_text()
    assert "| weights | of step 2, validation_loss 1.5000 (ema) |" in card and "Scores" not in card
    assert judge.selection.selected(best=True, steps=2) == {
        "step": 2,
        "validation_loss": 1.5,
        "weights": "ema",
    }
    # of other weights, and by another key, that is no best
    for recipe in (recipe_of("last"), recipe_of("ema", "validation/Art/loss")):
        other = Selection(recipe.eval, RunFolder(tmp_path))
        assert other.best_alike()["step"] == -1


def test_the_best_by_an_accuracy_is_the_highest(tmp_path: Path) -> None:
    key = "validation/de/accuracy"
    engine: Any = SimpleNamespace(rank=0)
    judge = Evaluator(recipe_of("last", key), None, engine, RunFolder(tmp_path))
    exported: list[Path] = []
    judge.export = lambda to, *_: exported.append(to)  # type: ignore[method-assign, assignment]
    for step, value in ((2, 0.5), (4, 0.75), (6, float("nan")), (8, 0.75)):
        judge.keep_if_best(step, value)
    assert len(exported) == 2
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 4, key: 0.75}


def test_a_row_without_an_average_has_none() -> None:
    model = problem.model()
    built = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "kl_init")
    assert average(built.algorithm, built.engine) is None


def test_the_average_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    one = Candidate("step-00000002", checkpoint=tmp_path)
    with pytest.raises(DataError, match=r"^eval.weights = ema: .* set eval.weights=last$"):
        score_all(recipe_of("ema"), [one], None, "test", SimpleNamespace())  # type: ignore[arg-type]

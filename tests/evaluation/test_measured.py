"""What validation measures while a run trains: by hand, on validation splits alone, and which key
is never measured."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from tests.made_recipes import MINIMAL
from tram_ds.evaluation import measured
from tram_ds.evaluation.measured import better, record_of, value_of
from tram_ds.recipe.file import RecipeError
from tram_ds.tracking.points import points_of

SCORES = {
    "art": {"loss": 1.0, "perplexity": 4.0},
    "law": {"loss": 3.0, "perplexity": 8.0},
    "sea": {"loss": 2.0, "perplexity": 16.0},
}


def test_a_record_by_hand_and_its_names_are_those_of_mlflow() -> None:
    """Trained on art and law; sea is all there is zero-shot."""
    assert record_of(SCORES, ["art", "law"], every=False) == {"validation_loss": (1 + 3) / 2}
    record = record_of(SCORES, ["art"], every=True)
    assert record["validation_loss"] == 1.0
    assert record["validation"]["zero_shot"] == {"loss": (3 + 2) / 2, "perplexity": (8 + 16) / 2}
    alone = record_of({"art": SCORES["art"]}, ["art"], every=True)
    assert list(alone["validation"]) == ["art"]
    for name, step, value, _ in points_of({"step": 3, **record}):
        key = "validation_loss" if name == "loss/validation" else name
        assert (step, value) == (3, value_of(record, key))


@pytest.mark.parametrize(
    ("key", "value", "best", "by", "found"),
    [
        ("validation_loss", 1.0, None, 0.0, True),
        ("validation_loss", math.nan, None, 0.0, False),
        ("validation_loss", 1.0, 1.25, 0.0, True),
        ("validation_loss", 1.0, 1.25, 0.25, False),
        ("validation/art/perplexity", 9.0, 8.0, 0.0, False),
        ("validation/de/accuracy", 0.75, 0.5, 0.0, True),
        ("validation/de/accuracy", 0.75, 0.5, 0.25, False),
        ("validation/de/accuracy", math.inf, 0.5, 0.0, False),
    ],
)
def test_better_is_lower_but_for_accuracies(
    key: str, value: float, best: float | None, by: float, found: bool
) -> None:
    assert better(key, value, best, by) == found


def task(valid: list[str]) -> Any:
    """A task of four domains, one of them trained on, that has no split but validation."""

    def eval_sets(split: str) -> dict[str, list[int]]:
        assert split == "validation"
        return {domain: [0] for domain in valid}

    return SimpleNamespace(
        train_domains=["art"],
        eval_domains=["art", "law", "sea", "sky"],
        eval_sets=eval_sets,
        metrics=lambda loss, count, correct: {"loss": loss / count, "perplexity": 1.0},
    )


KEY = "eval={every_steps: 2, select: best, domains: all, key: validation/%s}"


def test_domains_without_a_validation_split_are_named(recipe_of) -> None:
    every = recipe_of(MINIMAL, KEY % "zero_shot/loss")
    assert measured.check(every, task(["art", "law"])) == ["sea", "sky"]
    assert measured.check(every, task(["art", "law", "sea", "sky"])) == []
    trained = recipe_of(MINIMAL, "eval.every_steps=2")
    assert measured.check(trained, task(["art"])) == []
    said = r"no zero-shot domain .*law, sea, sky.*: set it to train"
    with pytest.raises(RecipeError, match=said):
        measured.check(every, task(["art"]))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("sea/loss", r"never measured.*one of art, law, zero_shot; METRIC of loss, perplexity"),
        ("lwa/loss", "did you mean 'validation/law/loss'"),
        ("law/accuracy", "never measured"),
    ],
)
def test_a_key_that_is_never_measured_is_refused(recipe_of, key: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"eval.key = validation/{key}: .*{said}"):
        measured.check(recipe_of(MINIMAL, KEY % key), task(["art", "law"]))

"""What validation measures while a run trains, and which of it the run goes by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tram_ds.evaluation.score import zero_shot_average
from tram_ds.recipe.file import RecipeError
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.wording import hint

LOSS, ZERO_SHOT = "validation_loss", "zero_shot"

DomainScores = Mapping[str, Mapping[str, float]]  # domain -> metric -> value


def record_of(scores: DomainScores, trained: Sequence[str], every: bool) -> dict[str, Any]:
    """What a validation run adds to metrics.jsonl: the mean loss over the training domains and,
    with `every`, each domain's metrics and their zero-shot averages."""
    found: dict[str, Any] = {
        LOSS: math.fsum(scores[d]["loss"] for d in trained) / len(trained),
    }
    if every:
        found["validation"] = dict(scores)
        if any(domain not in trained for domain in scores):
            metrics = next(iter(scores.values()))
            found["validation"][ZERO_SHOT] = {
                m: zero_shot_average(scores, trained, m) for m in metrics
            }
    return found


def value_of(record: Mapping[str, Any], key: str) -> float:
    """What the record says of eval.key."""
    if key == LOSS:
        return record[LOSS]
    domain, _, metric = key.removeprefix("validation/").rpartition("/")
    return record["validation"][domain][metric]


def better(key: str, value: float, best: float | None, by: float = 0.0) -> bool:
    """Whether a value of eval.key is better than the best so far, None at first, by more than `by`;
    NaN and infinity are not."""
    # here, because a comparison with NaN is False either way: as the first best it would stay
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value > best + by if key.endswith("/accuracy") else value < best - by


def check(recipe: Recipe, task: Any) -> list[str]:
    """The scored domains that validation cannot measure, for want of a validation split.

    RecipeError where eval.key is never measured, or no zero-shot domain is. task: that of the
    recipe, of which only validation splits are looked at.
    """
    if recipe.eval.every_steps is None or recipe.eval.domains != "all":
        return []
    there = list(task.eval_sets("validation"))
    missing = [domain for domain in task.eval_domains if domain not in there]
    zero_shot = [domain for domain in there if domain not in task.train_domains]
    if missing and not zero_shot:
        raise RecipeError(
            f"recipe {recipe.name}: eval.domains = all: no zero-shot domain has a validation "
            f"split, and test splits are for the end ({_some(missing)}): set it to trained"
        )
    groups = [*there, *([ZERO_SHOT] if zero_shot else [])]
    metrics = task.metrics(1.0, 1.0, 1.0)
    known = [LOSS, *(f"validation/{group}/{metric}" for group in groups for metric in metrics)]
    if recipe.eval.key not in known:
        raise RecipeError(
            f"recipe {recipe.name}: eval.key = {recipe.eval.key}: is never measured"
            f"{hint(recipe.eval.key, known)} (DOMAIN of validation/DOMAIN/METRIC is one of "
            f"{', '.join(groups)}; METRIC of {', '.join(metrics)})"
        )
    return missing


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"

"""What the choice of the test sets' rows adds to the noise of the seeds: all runs are scored on the
same rows, so in a draw of rows the frontier and the methods move together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tram_ds.comparison.frontier import Arm, Frontier

Array = np.ndarray


def shifts(arms: Sequence[Arm]) -> Array | None:
    """(draws, arms, columns): the arms' means in draws of the rows, less their means, all finite.
    None where rows are not known of every arm."""
    moved = _moved(arms)
    # a draw may leave a score without a number, such as an accuracy of 100 %
    found = None if moved is None else moved[np.isfinite(moved).all(axis=(1, 2))]
    return found if found is not None and len(found) else None


def _moved(arms: Sequence[Arm]) -> Array | None:
    moved = [arm.rows - arm.scores for arm in arms if arm.rows is not None]
    return np.stack([of.mean(axis=1) for of in moved], 1) if len(moved) == len(arms) else None


def variances(frontier: Frontier, methods: Sequence[Arm], rng: np.random.Generator) -> Array:
    """(methods, columns): of the residuals, over draws of the rows alone; 0 where rows are not
    known of every run.

    A run does better on some rows than another seed by chance. The seeds' noise has that already:
    it is taken off what the draws of the rows show of it.
    """
    arms = (*frontier.arms, *methods)
    moved = _moved(arms)
    if moved is None:
        return np.zeros((len(methods), arms[0].scores.shape[1]))
    own = np.stack([_by_chance(arm, rng) for arm in arms], 1)
    known = np.isfinite(moved).all(axis=(1, 2)) & np.isfinite(own).all(axis=(1, 2))
    whole, part = (_variance(frontier, methods, of[known]) for of in (moved, own))
    # two estimates, so the difference may come out below zero
    return np.maximum(whole - part, 0.0)


def _by_chance(arm: Arm, rng: np.random.Generator) -> Array:
    """(draws, columns): errors of the arm's mean with the variance that its seeds, each on other
    rows the better, give it; none of one seed."""
    assert arm.rows is not None
    moved = arm.rows - arm.scores
    around = moved - moved.mean(axis=1, keepdims=True)
    # signs, not normal numbers: those would give the product long tails, which _variance leaves out
    signs = rng.choice([-1.0, 1.0], (*around.shape[:2], 1))
    # n (n - 1): the variance of a mean from n deviations; of one seed these are zero
    return (signs * around).sum(axis=1) / np.sqrt(arm.n * max(arm.n - 1, 1))


def _variance(frontier: Frontier, methods: Sequence[Arm], moved: Array) -> Array:
    """Of the residuals where the means of the base arms, then of the methods, move so."""
    base = np.stack([arm.mean for arm in frontier.arms])
    theirs = np.stack([arm.mean for arm in methods])
    n, at = len(base), theirs[:, 0]
    drawn = [frontier.below(theirs + by[n:], base + by[:n], at) for by in moved]
    if not drawn:
        return np.full(theirs.shape, np.nan)
    found = np.stack(drawn)
    gone = np.isnan(found).all(axis=0)  # no base run is like it in-domain
    # as for the seeds: a draw in which two knots meet says little
    low, high = np.nanquantile(np.where(gone, 0.0, found), [0.158655, 0.841345], axis=0)
    return np.where(gone, np.nan, ((high - low) / 2) ** 2)

"""Intervals that hold for other rows of the test sets too: on synthetic runs whose rows are drawn
from a population in which the residual is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import stats

from tram_ds.comparison import row_noise
from tram_ds.comparison.frontier import Arm, Frontier, Scale, fit, residuals
from tram_ds.comparison.residual import Residual, verdict

LOG = Scale(log=True)
BASE = (2.80, 2.60, 2.45)  # log in-domain perplexity of three learning rates
PLANTED = -0.02
ROWS, DOMAINS, SEEDS, DRAWS, STUDIES = 150, 3, 3, 100, 100


def runs(
    rng: np.random.Generator, difficulty: np.ndarray, x: float, off: float, setting: float
) -> np.ndarray:
    """(seeds, rows, 1 + domains) losses of rows: their difficulty, which all runs share, what this
    setting does on each, what each seed does, and each seed's own luck."""
    outside = 3.0 + 0.6 * (x - 2.4) + off
    level = np.array([x, *[outside] * DOMAINS])
    of_setting = rng.normal(0, setting, difficulty.shape)
    of_seed = rng.normal(0, 0.12, (SEEDS, *difficulty.shape))
    luck = rng.normal(0, 0.003, (SEEDS, 1, 1 + DOMAINS))
    return level + difficulty + of_setting + of_seed + luck


def arm(losses: np.ndarray, counts: np.ndarray, strength: float) -> Arm:
    """counts: (draws, rows, columns), how often each row is drawn."""
    again = np.einsum("drc,src->dsc", counts, losses) / ROWS
    return Arm(f"{strength}", losses.mean(axis=1), strength, again)


def drawn_counts(rng: np.random.Generator, draws: int) -> np.ndarray:
    found = rng.multinomial(ROWS, [1 / ROWS] * ROWS, size=(draws, 1 + DOMAINS))
    return found.transpose(0, 2, 1).astype(float)


def study(
    rng: np.random.Generator,
    of_setting: float = 0.12,
    draws: int = DRAWS,
    planted: float = PLANTED,
) -> tuple[Frontier, Arm]:
    """Three base arms and a method, on test sets of their own."""
    difficulty = rng.normal(0, 1.0, (ROWS, 1 + DOMAINS))
    counts = drawn_counts(rng, draws)
    base = [arm(runs(rng, difficulty, x, 0.0, of_setting), counts, i) for i, x in enumerate(BASE)]
    frontier = fit(base, LOG)
    assert frontier is not None
    return frontier, arm(runs(rng, difficulty, 2.58, planted, of_setting), counts, 9)


@cache
def residuals_of_studies(planted: float = PLANTED, seed: int = 0) -> list[Residual]:
    rng = np.random.default_rng(seed)
    drawn = [study(rng, planted=planted) for _ in range(STUDIES)]
    return [residuals(frontier, [method], resamples=50)[0][0] for frontier, method in drawn]


def hits(of: list[Residual]) -> int:
    return sum(each.interval[0] <= PLANTED <= each.interval[1] for each in of)


def called_off(of: list[Residual]) -> int:
    return sum(verdict(each, each.p, margin=0.0).startswith("off") for each in of)


@pytest.mark.slow
def test_a_planted_residual_is_covered_whatever_the_rows() -> None:
    """Of 100 intervals of 95 %, no fewer than a count with a chance of 1 %, and with these draws
    the nominal share; those over seeds alone are of these rows alone, and miss it."""
    of = residuals_of_studies()
    assert hits(of) >= stats.binom.ppf(0.01, STUDIES, 0.95) == 89
    assert hits(of) >= 95
    assert hits([replace(each, rows=0.0) for each in of]) < 80


@pytest.mark.slow
def test_no_residual_is_seldom_called_off_on_other_rows() -> None:
    """With these draws in no more than 5 of 100 studies; by seeds alone in more than a share of
    5 % allows, whatever the draws."""
    of, most = residuals_of_studies(planted=0.0, seed=4), stats.binom.ppf(0.99, STUDIES, 0.05)
    assert called_off(of) <= 5 < most == 11
    assert called_off([replace(each, rows=0.0) for each in of]) > most


@pytest.mark.slow
def test_their_part_is_the_deviation_that_the_residuals_have() -> None:
    """Of the residuals over studies, each with other rows: within what 100 of them show."""
    of = residuals_of_studies()
    said = np.mean([each.error[0] ** 2 for each in of])
    low, high = stats.chi2.ppf([0.001, 0.999], STUDIES - 1) / (STUDIES - 1)
    assert low < said / np.var([each.value for each in of]) < high


def test_what_seeds_do_by_chance_on_single_rows_is_not_counted_twice() -> None:
    """Settings that are alike on every row: what draws of the rows show is the seeds' luck."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(4):
        frontier, method = study(rng, of_setting=0.0, draws=400)
        (of, *_), *_ = residuals(frontier, [method], resamples=50)
        shares.append(of.rows / of.error[0] ** 2)
    assert np.mean(shares) < 0.35  # of a part that is not negative; uncorrected it is two thirds


def test_rows_of_some_runs_alone_say_nothing() -> None:
    frontier, method = study(np.random.default_rng(2))
    rng = np.random.default_rng(3)
    assert (row_noise.variances(frontier, [replace(method, rows=None)], rng) == 0).all()
    assert (row_noise.variances(frontier, [method], rng) > 0).any()


def test_power_has_a_limit_where_rows_are_few() -> None:
    """No number of seeds makes up for the rows: their deviation alone is half of the residual."""
    of = Residual(3, -0.02, 3.0, own=1e-5, base=1e-5, seeds=3, arms=5, base_df=10)
    assert of.seeds_needed() is not None and replace(of, rows=0.01**2).seeds_needed() is None
    assert replace(of, rows=0.01**2).power(1000) == pytest.approx(
        stats.norm.cdf(2 - 1.96), abs=0.01
    )

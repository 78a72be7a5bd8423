"""Residuals off the base optimizer's frontier: on synthetic runs whose residual is known, over many
draws of their seeds; with ties, single seeds, arms that are missing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.interpolate import PchipInterpolator

from tram_ds.comparison.frontier import Arm, Frontier, Scale, columns, fit, residuals
from tram_ds.comparison.residual import Residual, line, verdict

LOG, LOGIT = Scale(log=True), Scale(log=False)
BASE = (2.80, 2.65, 2.55, 2.48, 2.45)  # log in-domain perplexity of five learning rates
DOMAINS = np.linspace(-0.05, 0.05, 6)
NOISE = 0.003
DRAWS = 100


def curve(x: np.ndarray) -> np.ndarray:
    return 3.0 + 0.6 * (x - 2.4) + 0.3 * (x - 2.4) ** 2


def arm(
    rng: np.random.Generator, x: float, residual: float = 0.0, seeds: int = 3, strength: float = 0.0
) -> Arm:
    """Runs around a point of the curve, `residual` above it, each with its own noise."""
    inside = x + rng.normal(0, NOISE, seeds)
    shared, own = rng.normal(0, NOISE, (seeds, 1)), rng.normal(0, NOISE, (seeds, len(DOMAINS)))
    outside = curve(inside)[:, None] + residual + DOMAINS + shared + own
    return Arm(f"{x}", np.column_stack([inside, outside]), strength)


def sweep(rng: np.random.Generator, seeds: int = 3) -> Frontier:
    found = fit([arm(rng, x, 0.0, seeds, i) for i, x in enumerate(BASE)], LOG)
    assert found is not None
    return found


@cache
def with_power(power: float) -> float:
    """The residual at 2.58 that three seeds show with this chance, from noise as 400 seeds show
    it."""
    rng = np.random.default_rng(7)
    known = residuals(sweep(rng, 400), [arm(rng, 2.58, seeds=400)])[0][0]
    tried = np.linspace(-0.03, -0.001, 59)
    return float(min(tried, key=lambda v: abs(replace(known, value=float(v)).power(3) - power)))


@cache
def drawn() -> list[list[Residual]]:
    """Of DRAWS sweeps of three seeds: no residual, one of -2 %, one that has 80 % power."""
    rng, found = np.random.default_rng(1), []
    for _ in range(DRAWS):
        planted = [(2.58, 0.0), (2.52, -0.02), (2.58, with_power(0.8))]
        methods = [arm(rng, x, residual) for x, residual in planted]
        found.append([of[0] for of in residuals(sweep(rng), methods, resamples=60)])
    return found


def within(of: Residual, value: float) -> bool:
    low, high = of.interval
    return low <= value <= high


@pytest.mark.parametrize(("method", "planted"), [(0, 0.0), (1, -0.02)])
def test_a_planted_residual_lies_in_its_interval(method: int, planted: float) -> None:
    """Of 100 intervals of 95 %, no fewer than the count that so many hit with a chance of 1 %."""
    hits = sum(within(of[method], planted) for of in drawn())
    assert hits >= stats.binom.ppf(0.01, DRAWS, 0.95) == 89
    assert hits >= 95  # and with these seeds the nominal share


def test_no_residual_is_seldom_called_off() -> None:
    false = [of[0] for of in drawn() if verdict(of[0], of[0].p, 0.01).startswith("off")]
    assert len(false) <= 5 < stats.binom.ppf(0.99, DRAWS, 0.05)


def test_the_power_that_is_said_is_the_share_called_off() -> None:
    """Within what 99 % of binomial counts of 100 at 80 % are."""
    off = [verdict(of[2], of[2].p, 0.01) == "off, better" for of in drawn()]
    low, high = stats.binom.ppf([0.005, 0.995], DRAWS, 0.8)
    assert low <= sum(off) <= high


def test_power_against_simulated_tests() -> None:
    """Means and variances as normal samples have them, tested as Welch does."""
    rng, n, draws = np.random.default_rng(3), 6, 20_000
    of = Residual(3, -0.01, 3.0, own=4e-5, base=2e-5, seeds=3, arms=5, base_df=10)
    value = rng.normal(of.value, np.sqrt((of.own + of.base) / n), draws)
    own = of.own * rng.chisquare(n - 1, draws) / (n - 1) / n
    base = of.base * rng.chisquare(5 * (n - 1), draws) / (5 * (n - 1)) / n
    df = (own + base) ** 2 / (own**2 / (n - 1) + base**2 / (5 * (n - 1)))
    rejected = 2 * stats.t.sf(np.abs(value) / np.sqrt(own + base), df) < 0.05
    # three deviations of the count, and what Welch's degrees of freedom leave out
    assert of.power(n) == pytest.approx(rejected.mean(), abs=3 * 0.5 / draws**0.5 + 0.01)
    assert replace(of, value=-10.0).power(2) == pytest.approx(1.0, abs=0.01)
    needed = of.seeds_needed()
    assert needed is not None and of.power(needed) >= 0.8 > of.power(needed - 1)


def test_the_frontier_is_the_spline_through_the_arms() -> None:
    """Of runs without noise; of two domains at 10 and 30 the average is 20."""
    x = np.log([10.0, 12.0, 15.0])
    base = [
        Arm(str(i), np.log([[np.exp(v), 10.0 * (i + 1), 30.0 * (i + 1)]] * 2), float(i))
        for i, v in enumerate(x)
    ]
    found = fit(base, LOG)
    assert found is not None and np.allclose(found.at(x)[:, 0], np.log([20.0, 40.0, 60.0]))
    middle = np.log([11.0])
    wanted = PchipInterpolator(x, np.log([20.0, 40.0, 60.0]))(middle)
    assert np.allclose(found.at(middle)[:, 0], wanted)
    assert np.isnan(found.at(np.log([9.0, 16.0]))).all(), "nothing is said beyond the base runs"


def test_a_rate_that_is_too_high_is_a_second_branch() -> None:
    """Log in-domain 3, 2, 1 with zero-shot 3, 2, 1, then back to 3 with 6: 3 at in-domain 3."""
    points = [(3.0, 3.0), (2.0, 2.0), (1.0, 1.0), (2.0, 4.0), (3.0, 6.0)]
    found = fit([Arm(str(i), np.array([p]), float(i)) for i, p in enumerate(points)], LOG)
    assert found is not None and len(found.branches) == 2
    assert np.allclose(found.at(np.array([1.0, 2.0, 2.5, 3.0]))[:, 0], [1.0, 2.0, 2.5, 3.0])


def test_arms_that_seeds_do_not_tell_apart_are_one_knot() -> None:
    """Exact ties, and in-domain means 0.001 apart with a deviation of 0.01 over seeds."""
    swing = np.array([-0.01, 0.0, 0.01])
    rows = [(2.0, 1.0), (2.001, 3.0), (2.5, 4.0), (2.5, 6.0)]
    arms = [Arm(str(r), np.column_stack([r[0] + swing, r[1] + 0 * swing])) for r in rows]
    found = fit(arms, LOG)
    assert found is not None and [len(knot) for knot in found.branches[0]] == [2, 2]
    assert np.allclose(found.at(np.array([2.0005, 2.5]))[:, 0], [2.0, 5.0])
    assert fit(arms[2:], LOG) is None, "two arms at one place are no curve"
    assert fit(arms[:1], LOG) is None


def test_one_seed_says_nothing_of_noise() -> None:
    rng = np.random.default_rng(5)
    single = sweep(rng, seeds=1)
    of = residuals(single, [arm(rng, 2.58)])[0][0]
    assert of.p is None and np.isnan(of.interval).all() and np.isfinite(of.value)
    assert verdict(of, of.p, 0.01) == "not separable: one seed a base arm"
    assert np.isnan(single.band(np.array([2.5]), resamples=10)).all()
    alone = residuals(sweep(rng), [arm(rng, 2.58, -0.02, seeds=1)], resamples=100)[0][0]
    assert alone.p is None and alone.seeds_needed() in range(2, 6)
    assert verdict(alone, None, 0.01).startswith("not separable at 1 seed; ")


def test_what_no_base_run_reaches_has_no_residual() -> None:
    rng = np.random.default_rng(6)
    of = residuals(sweep(rng), [arm(rng, 2.2)], resamples=10)[0][0]
    assert np.isnan(of.value) and of.p is None and of.seeds_needed() is None
    assert verdict(of, of.p, 0.01) == "no base run is like it in-domain"


def test_verdicts() -> None:
    of = Residual(3, -0.001, 3.0, own=1e-6, base=1e-6, seeds=3, arms=5, base_df=10)
    assert verdict(of, of.p, 0.01) == "on"
    assert verdict(replace(of, value=0.02), 0.001, 0.01) == "off, worse"
    assert verdict(replace(of, value=-0.02), 0.001, 0.01) == "off, better"
    loose = replace(of, own=1e-3, base=1e-3)
    needed = replace(loose, value=-0.02).seeds_needed()
    said = verdict(replace(loose, value=-0.02), 0.6, 0.01)
    assert said == f"not separable at 3 seeds; {needed} would separate it"
    assert verdict(replace(loose, value=0.0), 1.0, 0.01).endswith("; nor would 1000 be")


def test_seeds_needed_are_those_of_the_corrected_test() -> None:
    """A residual that seven rows looked at together leave untold is not told by as many seeds."""
    of = Residual(3, -0.01, 3.0, own=1.6e-5, base=1.2e-5, seeds=3, arms=5, base_df=10)
    assert of.p is not None and of.p < 0.05 < 7 * of.p
    needed = of.seeds_needed(7)
    assert needed is not None and needed > 3
    level = 1 - 0.05 / 7
    assert of.power(needed, level) >= 0.8 > of.power(needed - 1, level)
    said = verdict(of, 7 * of.p, 0.001, 7)
    assert said == f"not separable at 3 seeds; {needed} would separate it"


def test_runs_that_are_equal_are_told_from_those_that_are_not() -> None:
    """No noise at all: any difference counts, and none is none."""
    base = fit([Arm(str(v), np.array([[v, v + 1.0]] * 2)) for v in (1.0, 2.0)], LOG)
    assert base is not None
    same, other = (Arm("m", np.array([[1.5, y]] * 2)) for y in (2.5, 2.4))
    (first, _), (second, _) = residuals(base, [same, other], resamples=10)
    assert (first.p, second.p) == (1.0, 0.0) and second.value == pytest.approx(-0.1)


def test_domains_are_drawn_too() -> None:
    """A residual of -6 % in one domain of six and none elsewhere: -1 % at equal weights, which
    other domains need not show."""
    rng = np.random.default_rng(8)
    method = arm(rng, 2.58, seeds=30)
    method.scores[:, 1] -= 0.06
    of, *by_domain = residuals(sweep(rng, 30), [method], resamples=300)[0]
    assert of.value == pytest.approx(-0.01, abs=0.003)
    assert of.interval[1] < 0 < of.over_domains[1]
    # the mean of six draws of (-0.06, 0, 0, 0, 0, 0)
    wanted = np.var([-0.06, 0, 0, 0, 0, 0]) / 6
    assert of.domains == pytest.approx(wanted, rel=0.4)
    assert by_domain[0].value == pytest.approx(-0.06, abs=0.004)
    assert np.isnan(by_domain[0].domains)


def test_scales() -> None:
    assert np.allclose(LOGIT.up(np.array([50.0, 73.105858])), [0.0, -1.0])
    assert np.allclose(LOGIT.down(LOGIT.up(np.array([10.0, 90.0]))), [10.0, 90.0])
    assert np.isnan(LOGIT.up(np.array([0.0, 100.0]))).all() and np.isnan(LOG.up(np.array([0.0])))
    scores = LOGIT.up(np.array([80.0, 50.0, 70.0]))
    assert np.allclose(LOGIT.down(columns(scores, LOGIT)), [60.0, 50.0, 70.0])


def test_a_line_through_the_other_methods() -> None:
    """y = x, x within one of it; a point two above, by the formula of a prediction."""
    x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.1, 0.9, 1.9, 3.1])
    wanted: Any = stats.linregress(x, y)
    found, t = line(x, y, 1.5, 3.5)
    assert found == pytest.approx(3.5 - (wanted.intercept + 1.5 * wanted.slope))
    sd = np.sqrt(((y - wanted.intercept - wanted.slope * x) ** 2).sum() / 2)
    assert t == pytest.approx(found / (sd * np.sqrt(1 + 1 / 4)))  # x = 1.5 is their mean
    assert np.isnan(line(x[:2], y[:2], 1.0, 1.0)).all()
    assert np.isnan(line(x * 0, y, 1.0, 1.0)).all()

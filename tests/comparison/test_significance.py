"""The tests against scipy, and on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tram_ds.comparison import significance as tests

RNG = np.random.default_rng(0)


def test_ks_is_scipys() -> None:
    a, b = RNG.normal(0, 1, 10), RNG.normal(1, 1, 10)
    found = tests.ks(a.tolist(), b.tolist())
    want = stats.ks_2samp(a, b)
    assert (found.p, found.statistic, found.n) == (
        pytest.approx(want.pvalue),
        pytest.approx(want.statistic),
        10,
    )


def test_wilcoxon_is_scipys_and_ties_do_not_count() -> None:
    a, b = RNG.normal(0, 1, 14), RNG.normal(0.5, 1, 14)
    found = tests.wilcoxon(a.tolist(), b.tolist())
    assert found.p == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert tests.wilcoxon([1.0] * 20, [1.0] * 20).why == "not enough domains: 0 differ, 8 needed"


def test_the_bootstrap_interval_is_scipys() -> None:
    a, b = RNG.normal(1, 1, 20), RNG.normal(0, 1, 20)
    interval, verdict = tests.bootstrap(a.tolist(), b.tolist())
    want = stats.bootstrap(
        (a - b,), np.mean, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert interval is not None and interval.mean == pytest.approx(np.mean(a - b))
    width = want.high - want.low
    assert interval.low == pytest.approx(want.low, abs=0.03 * width)
    assert interval.high == pytest.approx(want.high, abs=0.03 * width)
    assert verdict.p is not None and verdict.n == 20


def test_the_bootstrap_finds_a_difference_that_is_there_and_none_that_is_not() -> None:
    noise = RNG.normal(0, 1, 20)
    _, there = tests.bootstrap((noise + 5).tolist(), noise.tolist())
    assert there.p is not None and there.p < 1e-3
    _, none = tests.bootstrap(noise.tolist(), (noise * -1).tolist())
    assert none.p is not None and none.p > 0.01
    _, same = tests.bootstrap([1.0] * 8, [1.0] * 8)
    assert same.p == 1.0


def test_the_bootstrap_of_symmetric_noise_is_calibrated() -> None:
    """Under no difference p < 0.05 happens in about one of twenty; the percentile interval of 20 is
    a little narrow."""
    found = [
        tests.bootstrap(RNG.normal(0, 1, 20).tolist(), [0.0] * 20, alpha=0.05)[1].p
        for _ in range(200)
    ]
    assert 0.01 <= np.mean([p < 0.05 for p in found if p is not None]) <= 0.12


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 6), (0.01, 8)])
def test_too_few_seeds_are_said_to_be_too_few(alpha: float, needed: int) -> None:
    assert tests.pairs_needed(alpha) == needed
    assert (
        stats.wilcoxon(np.arange(1, needed + 1)).pvalue
        <= alpha
        < stats.wilcoxon(np.arange(1, needed)).pvalue
    )
    a, b = list(range(10, 10 + needed - 1)), [0] * (needed - 1)
    interval, verdict = tests.bootstrap(a, b, alpha)
    assert (
        verdict.p is None and verdict.text(alpha) == f"not enough seeds: {needed - 1} of {needed}"
    )
    assert interval is not None  # it is still shown
    assert tests.bootstrap([1.0], [2.0])[0] is None
    assert tests.wilcoxon(a, b, alpha, of="seeds").p is None
    assert tests.ks([1, 2, 3], [4, 5, 6]).p is None


def test_holm_and_the_t_interval() -> None:
    assert tests.holm([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]
    assert tests.holm([0.9, 0.8]) == [1.0, 1.0]
    values = RNG.normal(3, 2, 7)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert tests.t_half_width(values.tolist()) == pytest.approx((high - low) / 2)
    assert math.isnan(tests.t_half_width([1.0]))


def test_texts() -> None:
    assert tests.Verdict("ks", 10, 0.00001).text() == "p < 0.0001, n = 10 *"
    assert tests.Verdict("ks", 10, 0.02).text() == "p = 0.0200, n = 10"

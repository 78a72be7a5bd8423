"""Is a difference more than chance? The paper's tests, and a bootstrap over seeds, each with its
sample size.

A paired comparison of n values cannot have a p below 2 ** (1 - n), however large the difference:
where that is above alpha, the answer is "not enough", never a p value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Verdict:
    """A test's answer. p: None where the sample is too small; `why` then says what is missing. n:
    the sample size."""

    test: str
    n: int
    p: float | None
    statistic: float = math.nan
    why: str = ""

    def text(self, alpha: float = 0.01) -> str:
        """For a table cell: the p value with its sample size, or why there is none."""
        if self.p is None:
            return self.why
        return f"p {p_text(self.p, '= ')}, n = {self.n}{' *' if self.p < alpha else ''}"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; NaN bounds where one value says nothing of the others."""

    mean: float
    low: float
    high: float


def p_text(p: float | None, equals: str = "") -> str:
    """A p value with four decimals; a dash for None."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{equals}{p:.4f}"


def pairs_needed(alpha: float) -> int:
    """The smallest number of pairs that can give p <= alpha: 6 for 0.05, 8 for 0.01."""
    return math.ceil(1 - math.log2(alpha))


def ks(a: Sequence[float], b: Sequence[float], alpha: float = 0.01) -> Verdict:
    """Two-sample Kolmogorov-Smirnov: are the two sets of scores from one distribution? Pairing is
    not used."""
    # all of one above all of the other, either way: two of so many orders, and none is rarer
    smallest = 2 / math.comb(len(a) + len(b), len(a)) if len(a) and len(b) else 1.0
    if smallest > alpha:
        return Verdict(
            "ks", min(len(a), len(b)), None, why=f"not enough domains: {min(len(a), len(b))}"
        )
    found: Any = stats.ks_2samp(a, b)
    p = max(smallest, float(found.pvalue))
    return Verdict("ks", min(len(a), len(b)), p, float(found.statistic))


def wilcoxon(
    a: Sequence[float], b: Sequence[float], alpha: float = 0.01, of: str = "domains"
) -> Verdict:
    """Signed ranks of the paired differences a - b. Equal pairs say nothing and do not count."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    n = int(np.count_nonzero(differences))
    if n < pairs_needed(alpha):
        return Verdict(
            "wilcoxon", n, None, why=f"not enough {of}: {n} differ, {pairs_needed(alpha)} needed"
        )
    # scipy leaves zeros out as well; with ties, zeros or many pairs its p may be asymptotic, and
    # then below what n pairs can give: _possible
    found: Any = stats.wilcoxon(differences)
    return Verdict("wilcoxon", n, _possible(float(found.pvalue), n), float(found.statistic))


def bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    alpha: float = 0.01,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> tuple[Interval | None, Verdict]:
    """The mean of a - b, paired by seed, resampled over seeds: (interval, verdict). No interval for
    one pair. rows: (any number, pairs), a - b in draws of the rows that they were scored on, which
    are resampled with the seeds."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    n = len(differences)
    missing = f"not enough seeds: {n} of {pairs_needed(alpha)}"
    if n < 2:
        return None, Verdict("bootstrap", n, None, why=missing)
    chosen = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    means = differences[chosen].mean(axis=1)
    if rows is not None:
        # repeated: there are fewer draws of rows than resamples, each with other seeds
        drawn = np.resize(rows, (RESAMPLES, n))
        means = np.take_along_axis(drawn, chosen, axis=1).mean(axis=1)
    interval = Interval(
        float(differences.mean()), *(float(q) for q in np.quantile(means, [0.025, 0.975]))
    )
    if n < pairs_needed(alpha):
        return interval, Verdict("bootstrap", n, None, why=missing)
    # the rarer side counts twice, for a test of both; + 1 below: no p of a simulation is 0
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return interval, Verdict(
        "bootstrap", n, _possible(2 * (beyond + 1) / (RESAMPLES + 1), n), interval.mean
    )


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p values corrected for how many were made (Holm); None stays None."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, i) in enumerate(known):
        # never below a smaller p's, or a row could pass where a clearer one has failed
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        corrected[i] = highest
    return corrected


def t_half_width(values: Sequence[float], level: float = 0.95) -> float:
    """Half the width of the t interval of a mean; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.5 + level / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def mean_interval(values: Sequence[float], log: bool) -> Interval:
    """The mean of finite values with its 95 % t interval.

    log: of positive values whose logarithms are what varies (perplexities): the geometric mean, and
    an interval that is symmetric in the logarithm, so never below zero.
    """
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    scaled = np.log(values) if log else np.asarray(values, float)
    mean, half = float(np.mean(scaled)), t_half_width(scaled.tolist())
    bounds = (mean, mean - half, mean + half)
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(x)) if log else x for x in bounds))


def _possible(p: float, n: int) -> float:
    """No p below what n pairs can give: all of one sign, either way, of 2 ** n patterns."""
    return min(1.0, max(2.0 ** (1 - n), p))

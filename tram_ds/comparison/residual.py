"""A method's residual off a frontier: its interval, what can be said of it, and how many seeds
would say more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8
MOST = 1000  # seeds: beyond, there is no hope
ROUNDING = 1e-12  # of doubles: a residual below is none


@dataclass(frozen=True)
class Residual:
    """n: seeds of the method. value: below zero is better. level: the frontier's score there.

    own, base: variances of the two sides if each had one seed. seeds: of a base arm, on average.
    base_df: degrees of freedom of `base`, which all arms share. domains: the variance with the
    domains drawn too; NaN for a single domain. rows: the variance that the choice of the test
    sets' rows adds, whatever the number of seeds; 0 where it is not known.
    """

    n: int
    value: float
    level: float
    own: float
    base: float
    seeds: float
    arms: int
    base_df: int
    domains: float = math.nan
    of_domains: int = 0
    rows: float = 0.0

    def _error(self, n: float, seeds: float, df: float, base_df: float) -> tuple[float, float]:
        """(standard error, its degrees of freedom by Welch and Satterthwaite)."""
        own, base = self.own / n, self.base / seeds
        parts = own**2 / df + base**2 / base_df if df > 0 and base_df > 0 else math.nan
        # a test set has so many rows that their part has no limit to its degrees of freedom
        whole = own + base + self.rows
        # no noise, no limit; a NaN is true in Python, and goes on
        return math.sqrt(whole), whole**2 / parts if parts else math.inf

    @cached_property
    def error(self) -> tuple[float, float]:
        """(standard error, degrees of freedom); NaN where seeds do not show the noise: one of the
        method, or one of every base arm."""
        if self.n < 2 or self.base_df < 1:
            return math.nan, math.nan
        return self._error(self.n, self.seeds, self.n - 1, self.base_df)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, over seeds, and rows where their part is known."""
        se, df = self.error
        half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * se
        return self.value - half, self.value + half

    @property
    def over_domains(self) -> tuple[float, float]:
        """95 %, over the same and domains: for further domains of this kind."""
        _, df = self.error
        # the domains are a sample too, of so many: the edge of a larger one would be too near
        df = min(df, self.of_domains - 1) if self.of_domains > 1 else math.nan
        half = float(stats.t.ppf(0.5 + LEVEL / 2, df)) * math.sqrt(self.domains + self.rows)
        return self.value - half, self.value + half

    @property
    def p(self) -> float | None:
        """Two-sided, of a residual of zero; None without an interval."""
        se, df = self.error
        if not math.isfinite(self.value + se):
            return None
        if se == 0.0:
            return 0.0 if abs(self.value) > ROUNDING else 1.0
        return float(2 * stats.t.sf(abs(self.value) / se, df))

    def power(self, n: int, level: float = LEVEL) -> float:
        """The chance that an interval of this level over n seeds, of the method and of every base
        arm, leaves zero out if the residual is what was observed."""
        se, df = self._error(n, n, n - 1, self.arms * (n - 1))
        if se == 0.0:
            return 1.0 if abs(self.value) > ROUNDING else 1 - level
        edge = stats.t.ppf(0.5 + level / 2, df)
        away = abs(self.value) / se
        found = float(stats.nct.sf(edge, df, away) + stats.nct.cdf(-edge, df, away))
        # so far away that scipy has no number, the noise of the deviation alone decides
        return found if math.isfinite(found) else float(stats.chi2.cdf(df * (away / edge) ** 2, df))

    def seeds_needed(self, rows: int = 1) -> int | None:
        """The fewest seeds with 80 % power for the observed residual where so many rows are looked
        at together (Bonferroni); None if more than MOST, or where the noise is not known."""
        # the strictest level of Holm's, who corrects the verdict: enough whatever the other rows' p
        level = 1 - (1 - LEVEL) / rows
        if not math.isfinite(self.value + self.own + self.base + self.rows):
            return None
        low, high = 2, MOST
        if not self.power(high, level) >= POWER:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(middle, level) >= POWER else (middle + 1, high)
        return low


def verdict(of: Residual, p: float | None, margin: float, rows: int = 1) -> str:
    """In words. p: corrected for how many rows were looked at. margin: a residual within it is
    none that matters."""
    if not math.isfinite(of.value):
        return "no base run is like it in-domain"
    if of.base_df < 1:
        return "not separable: one seed a base arm"
    low, high = of.interval
    # before `on`: an interval within the margin may leave zero out
    if p is not None and p < 1 - LEVEL:
        return f"off, {'better' if of.value < 0 else 'worse'}"
    if -margin < low and high < margin:
        return "on"
    needed = of.seeds_needed(rows)
    more = f"{needed} would separate it" if needed else f"nor would {MOST} be"
    return f"not separable at {of.n} seed{'s' * (of.n != 1)}; {more}"


def line(x: np.ndarray, y: np.ndarray, at: float, value: float) -> tuple[float, float]:
    """(residual, its t) of a further point off the least-squares line through points: the error
    is that of a prediction, with n - 2 degrees of freedom. NaN for fewer than three points, or
    where all x are equal."""
    n, mean = len(x), x.mean() if len(x) else math.nan
    spread = float(((x - mean) ** 2).sum())
    if n < 3 or spread == 0.0:
        return math.nan, math.nan
    slope = float(((x - mean) * (y - y.mean())).sum()) / spread
    around = y - y.mean() - slope * (x - mean)
    found = float(value - y.mean() - slope * (at - mean))
    # 1 +: the noise of the further point, beside that of the line
    se = math.sqrt((around**2).sum() / (n - 2) * (1 + 1 / n + (at - mean) ** 2 / spread))
    return found, found / se if se > 0 else math.nan

"""Whether a method is off the base optimizer's frontier: the curve of zero-shot against in-domain
quality along which a learning rate, or more steps, moves plain training for free.

Everything here is on a scale where noise is alike and lower is better: log perplexity, or the logit
of the error. A method's residual is its zero-shot average less the frontier's at its own in-domain
score: below zero is better than anything plain training reaches there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.interpolate import PchipInterpolator

from tram_ds.comparison import row_noise
from tram_ds.comparison.residual import Residual

Array = np.ndarray
RESAMPLES = 1000
LEAST = 2  # arms that are apart in-domain: fewer are no curve
APART = 2.0  # standard errors between two arms' in-domain means; nearer ones are one knot


@dataclass(frozen=True)
class Scale:
    """log: of perplexities, their logarithm; else of accuracies in percent, the logit of the
    error. NaN where there is none: a perplexity of 0, an accuracy of 0 or 100 %."""

    log: bool

    def up(self, scores: Array) -> Array:
        with np.errstate(all="ignore"):
            # of the error, not of the accuracy: lower is better on both scales
            found = np.log(scores) if self.log else np.log((100.0 - scores) / scores)
        return np.where(np.isfinite(found), found, np.nan)

    def down(self, scaled: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(scaled) if self.log else 100.0 / (1.0 + np.exp(scaled))


@dataclass(frozen=True)
class Arm:
    """Runs of one setting. scores: (seeds, 1 + domains) on a Scale, the training domain first, all
    finite. strength: what orders arms along their curve, such as the learning rate. rows: (draws,
    seeds, 1 + domains) the same where the rows of the test sets are drawn anew, in one draw the
    same rows for every run; None where their scores are not known."""

    name: str
    scores: Array
    strength: float = 0.0
    rows: Array | None = None

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def mean(self) -> Array:
        return self.scores.mean(axis=0)


@dataclass(frozen=True)
class Frontier:
    """The curve through the base arms: a monotone spline (PCHIP: it does not swing beyond its
    knots) from the in-domain score to the zero-shot average and to every domain.

    branches: knots, each the arms that are one in-domain. There are two where a learning rate is so
    high that the in-domain score comes back: where both reach, the better one is the frontier.
    """

    arms: tuple[Arm, ...]
    scale: Scale
    branches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def df(self) -> int:
        """Degrees of freedom of the seeds' noise, pooled over arms."""
        return sum(arm.n - 1 for arm in self.arms)

    @property
    def seeds(self) -> float:
        return float(np.mean([arm.n for arm in self.arms]))

    @property
    def domains(self) -> int:
        return self.arms[0].scores.shape[1] - 1

    @property
    def span(self) -> tuple[float, float]:
        """In-domain scores from the best to the worst base run: there is no curve beyond."""
        scores = np.concatenate([arm.scores[:, 0] for arm in self.arms])
        return float(scores.min()), float(scores.max())

    def at(self, x: Array) -> Array:
        """(points, 1 + domains): the frontier at in-domain scores x; NaN beyond the base runs."""
        means = np.stack([arm.mean for arm in self.arms])
        return self._curve(np.asarray(x, float), means, columns(means, self.scale))

    def draws(
        self, x: Array, chosen: Array, rng: np.random.Generator, shifts: Array | None = None
    ) -> tuple[Array, Array]:
        """The frontier at x in draws of the seeds' noise, and its zero-shot average over the
        domains chosen in each draw. chosen: (draws, domains), numbers of domains. shifts: of the
        arms' means, (any number, arms, 1 + domains), which are drawn with it. Returns (draws,
        points, 1 + domains), (draws, points). NaN where one seed an arm says nothing of noise."""
        means = np.stack([arm.mean for arm in self.arms])
        shape = (len(chosen), len(x), means.shape[1])
        if self.df == 0:
            return np.full(shape, np.nan), np.full(shape[:2], np.nan)
        counts = np.array([arm.n for arm in self.arms])
        drawn = means + noise(self.arms, counts, len(chosen), rng)
        if shifts is not None:
            # np.resize repeats them: the draws of rows that are finite may be fewer
            drawn += np.resize(shifts, drawn.shape)
        again = _average(np.take_along_axis(drawn[..., 1:], chosen[:, None, :], 2), self.scale)
        y = np.concatenate([columns(drawn, self.scale), again], axis=2)
        found = np.stack([self._curve(x, m, of) for m, of in zip(drawn, y, strict=True)])
        return found[..., :-1], found[..., -1]

    def below(self, methods: Array, means: Array, as_at: Array) -> Array:
        """(methods, 1 + domains): scores of methods (methods, 1 + domains) less the frontier at
        their in-domain scores, if `means` (arms, 1 + domains) were those of the arms; on the
        branches that reach as_at (methods,)."""
        y = columns(means, self.scale)
        return columns(methods, self.scale) - self._curve(methods[:, 0], means, y, as_at)

    def band(self, x: Array, level: float = 0.95, resamples: int = RESAMPLES) -> Array:
        """(2, points): the lower and upper bound of the zero-shot average at x."""
        # a fixed seed: the same runs give the same band, and the same tables, every time
        rng = np.random.default_rng(0)
        chosen = _chosen(self.domains, resamples, rng)
        found, _ = self.draws(np.asarray(x, float), chosen, rng, row_noise.shifts(self.arms))
        ends = [0.5 - level / 2, 0.5 + level / 2]
        return np.quantile(found[..., 0], ends, axis=0)

    def _curve(self, x: Array, means: Array, y: Array, as_at: Array | None = None) -> Array:
        """The better of the branches that reach x, or as_at instead."""
        found = np.full((len(self.branches), len(x), y.shape[1]), np.nan)
        for i, branch in enumerate(self.branches):
            # by as_at no draw leaves the branch that its method is on
            there = self._reach(branch, x if as_at is None else as_at)
            if there.any():
                found[i, there] = self._spline(branch, x[there], means, y)
        # lower is better; fmin, because a branch that does not reach x is NaN there
        return np.fmin.reduce(found)

    def _reach(self, branch: Sequence[Sequence[int]], x: Array) -> Array:
        runs = np.concatenate([self.arms[a].scores[:, 0] for knot in branch for a in knot])
        return (x >= runs.min()) & (x <= runs.max())

    def _spline(self, branch: Sequence[Sequence[int]], x: Array, means: Array, y: Array) -> Array:
        """Straight on beyond the outermost means, as far as runs reach."""
        share = np.zeros((len(branch), len(self.arms)))
        for k, knot in enumerate(branch):
            # by the number of seeds: a knot is the mean of all runs of its arms
            share[k, list(knot)] = [self.arms[a].n for a in knot]
        share /= share.sum(axis=1, keepdims=True)
        at = share @ means[:, 0]
        order = np.argsort(at, kind="stable")
        # draws may bring knots together: a step between doubles is an edge that is not used
        at = np.maximum.accumulate(at[order] + np.arange(len(at)) * 1e-12)
        curve = PchipInterpolator(at, (share @ y)[order])
        # scipy's PCHIP goes on beyond its ends with the last cubic, which may turn back
        inside = np.clip(x, at[0], at[-1])
        found = curve(inside)
        if (beyond := x != inside).any():
            found[beyond] += curve(inside[beyond], 1) * (x - inside)[beyond, None]
        return found


def columns(scores: Array, scale: Scale) -> Array:
    """(..., 1 + domains) of scores (..., 1 + domains): the zero-shot average, then every domain
    but the training domain. The average is that of the scores, as papers print it, then scaled."""
    return np.concatenate([_average(scores[..., 1:], scale), scores[..., 1:]], axis=-1)


def _average(scores: Array, scale: Scale) -> Array:
    return scale.up(scale.down(scores).mean(axis=-1, keepdims=True))


def noise(arms: Sequence[Arm], counts: Array, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples, counts, columns): errors of means of as many seeds, normal, with the covariance
    of the arms' runs around their means, pooled. Of few seeds an ordinary bootstrap is too
    narrow: it draws the same two or three runs again."""
    around = np.concatenate([arm.scores - arm.mean for arm in arms if arm.n > 1])
    df = sum(arm.n - 1 for arm in arms)
    # normal weights of the runs' deviations have their covariance: the matrix itself, which is
    # singular where there are fewer runs than columns, is never factored
    drawn = rng.standard_normal((resamples, len(counts), len(around))) @ around
    return drawn / np.sqrt(df * counts)[:, None]


def fit(arms: Sequence[Arm], scale: Scale) -> Frontier | None:
    """The frontier of base arms; None of fewer than LEAST that are apart in-domain."""
    arms = sorted(arms, key=lambda arm: arm.strength)
    if len(arms) < LEAST:
        return None
    x = np.array([arm.mean[0] for arm in arms])
    counts = np.array([arm.n for arm in arms], float)
    df = sum(arm.n - 1 for arm in arms)
    spread = sum(float(((a.scores[:, 0] - a.mean[0]) ** 2).sum()) for a in arms)
    sd = math.sqrt(spread / df) if df else 0.0
    best = int(x.argmin())
    apart = APART * sd * np.sqrt(1 / counts + 1 / counts[best])
    # what is not told from the best belongs to both ways that lead there
    near = {int(i) for i in np.flatnonzero(x - x[best] <= apart)}
    # of one strength nothing orders the arms, so there is one way
    whole = len({arm.strength for arm in arms}) == 1
    sides = [set(range(len(arms)))] if whole else [set(range(best)), set(range(best, len(arms)))]
    branches = [_knots(sorted(side | near), x, counts, sd) for side in sides]
    kept = [branch for branch in dict.fromkeys(branches) if len(branch) >= LEAST]
    return Frontier(tuple(arms), scale, tuple(kept)) if kept else None


def _knots(members: list[int], x: Array, counts: Array, sd: float) -> tuple[tuple[int, ...], ...]:
    """Arms by their in-domain mean; those that the seeds do not tell apart are one knot."""
    found: list[list[int]] = []
    for arm in sorted(members, key=lambda a: x[a]):
        if found:
            knot = found[-1]
            gap = x[arm] - np.average(x[knot], weights=counts[knot])
            if gap <= APART * sd * math.sqrt(1 / counts[arm] + 1 / counts[knot].sum()):
                knot.append(arm)
                continue
        found.append([arm])
    return tuple(tuple(knot) for knot in found)


def residuals(
    frontier: Frontier, methods: Sequence[Arm], resamples: int = RESAMPLES
) -> list[list[Residual]]:
    """Of every method: the residual of the zero-shot average, then of every domain. NaN where no
    base run is as good, or as bad, in-domain."""
    rng = np.random.default_rng(0)
    chosen = _chosen(frontier.domains, resamples, rng)
    x = np.array([m.mean[0] for m in methods])
    level = frontier.at(x)
    theirs, theirs_chosen = frontier.draws(x, chosen, rng)
    base = _variance(theirs)
    rows = row_noise.variances(frontier, methods, rng)
    found = []
    for i, method in enumerate(methods):
        own, own_chosen = _own(frontier, method, chosen, rng)
        value = columns(method.mean, frontier.scale) - level[i]
        alike = {"seeds": frontier.seeds, "arms": len(frontier.arms), "base_df": frontier.df}
        of_method = [
            Residual(
                n=method.n,
                value=float(value[c]),
                level=float(level[i, c]),
                # as if of one seed: a Residual divides by any number of them
                own=float(own[c]) * method.n,
                base=float(base[i, c]) * frontier.seeds,
                rows=float(rows[i, c]),
                **alike,
            )
            for c in range(len(value))
        ]
        # paired: in a draw both sides are averaged over the same domains
        wide = float(_variance(own_chosen - theirs_chosen[:, i]))
        of_method[0] = replace(of_method[0], domains=wide, of_domains=frontier.domains)
        found.append(of_method)
    return found


def _chosen(domains: int, resamples: int, rng: np.random.Generator) -> Array:
    return rng.integers(domains, size=(resamples, domains))


def _own(
    frontier: Frontier, method: Arm, chosen: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """(variance of the method's mean around a frontier that stands still, by column; draws of its
    average over the domains chosen). Of one seed the base runs' noise stands for its own."""
    of = [method] if method.n > 1 else list(frontier.arms)
    if sum(arm.n - 1 for arm in of) == 0:
        return np.full(method.scores.shape[1], np.nan), np.full(len(chosen), np.nan)
    drawn = method.mean + noise(of, np.array([method.n]), len(chosen), rng)[:, 0]
    # a draw may pass the last base run: the frontier's end stands for what is beyond
    moved = frontier.at(np.clip(drawn[:, 0], *frontier.span))
    still = frontier.at(method.mean[:1])[0, 0]
    again = _average(np.take_along_axis(drawn[:, 1:], chosen, axis=1), frontier.scale)[:, 0]
    return _variance(columns(drawn, frontier.scale) - moved), again - (moved[:, 0] - still)


def _variance(drawn: Array) -> Array:
    """Over the first axis, from the middle two thirds: a draw in which two knots meet says
    little."""
    # where a normal is one deviation off its mean
    low, high = np.quantile(drawn, [0.158655, 0.841345], axis=0)
    return ((high - low) / 2) ** 2

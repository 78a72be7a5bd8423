"""A table's runs as the two sides of a frontier: base arms by how long they trained, and the rows
that are held against them at equal steps and at equal FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tram_ds.comparison.collect import Table
from tram_ds.comparison.compute import examples, samples
from tram_ds.comparison.frontier import Arm, Frontier, Scale, fit
from tram_ds.comparison.row_draws import Draws, Key
from tram_ds.comparison.run import Run

# 25 %: base at 2.4 times the steps stands for TRAM's 7/3; MESA's 4/3 is near neither 1 nor 2.4
EQUAL = {"steps": 1.02, "FLOPs": 1.25}  # ratio of what still counts as equal


@dataclass(frozen=True)
class Member:
    """A row of the table, or a point of the interpolation of its runs. samples: examples seen.
    examples: compute, in examples of plain training. seeds: of arm.scores, in its order."""

    arm: Arm
    seeds: tuple[int, ...]
    samples: float
    examples: float

    def spent(self, kind: str) -> float:
        return self.samples if kind == "steps" else self.examples


@dataclass(frozen=True)
class Sides:
    """base: the arms of plain training. methods: the other rows. interpolated: points between the
    pre-trained model and base runs. curves: of every run, its interpolation (points, 1 + domains).
    notes: what was left out. rows: what the arms' are of."""

    domains: tuple[str, ...]
    scale: Scale
    base: tuple[Member, ...]
    methods: tuple[Member, ...]
    interpolated: tuple[Member, ...]
    curves: Mapping[str, Sequence[np.ndarray]]
    notes: tuple[str, ...]
    rows: Draws | None = None

    @property
    def budgets(self) -> dict[float, list[Member]]:
        """Examples that base arms saw -> those arms, the fewest first."""
        found: dict[float, list[Member]] = {}
        for member in sorted(self.base, key=lambda m: m.samples):
            # lengths that differ by rounding are one budget, or each had too few arms for a curve
            near = next((b for b in found if ratio(b, member.samples) <= EQUAL["steps"]), None)
            found.setdefault(member.samples if near is None else near, []).append(member)
        return found

    @property
    def curves_there(self) -> bool:
        return any(self.curves.values())

    def frontiers(self) -> dict[float, Frontier | None]:
        """Of every budget; None where its arms are too few or too near for a curve."""
        return {b: fit([m.arm for m in of], self.scale) for b, of in self.budgets.items()}

    def budget(self, member: Member, kind: str) -> float | None:
        """That of base arms with steps, or FLOPs, like this row's; None if there is none."""
        nearest = min(self.budgets, key=lambda b: ratio(b, member.spent(kind)), default=math.inf)
        return nearest if ratio(nearest, member.spent(kind)) <= EQUAL[kind] else None


def ratio(a: float, b: float) -> float:
    """How many times the larger is the smaller."""
    return max(a, b) / min(a, b) if min(a, b) > 0 and max(a, b) < math.inf else math.inf


def sides(table: Table, rows: Draws | None = None) -> Sides:
    """Of a table with a training domain and columns never trained on. rows: the same with the rows
    of the test sets drawn anew, where that is known."""
    layout = table.layout
    assert layout.train is not None
    domains = tuple(c for c in table.values if c in layout.zero_shot)
    scale, wanted = Scale(layout.log), [layout.train, *domains]
    base, methods, between, notes = [], [], [], []
    curves: dict[str, list[np.ndarray]] = {}
    for method, runs in table.runs.items():
        scaled = scale.up(table.of(method)[wanted].to_numpy(float))
        whole = [bool(np.isfinite(row).all()) for row in scaled]
        seeds = [int(s) for s in table.of(method).index]
        lacking = [str(s) for s, there in zip(seeds, whole, strict=True) if not there]
        if lacking:
            notes.append(f"without a score in every column: {method}, seed {', '.join(lacking)}")
        if not any(whole):
            continue
        kept = tuple(s for s, there in zip(seeds, whole, strict=True) if there)
        again = _again(rows, [(method, seed, 1.0) for seed in kept], wanted, scale)
        member = _member(method, scaled[whole], kept, runs, again)
        plain = runs[0].recipe["algorithm"]["name"] == "base"
        (base if plain else methods).append(member)
        along = {run.seed: _interpolation(run, table, wanted, scale) for run in runs}
        curves[method] = [np.stack(list(points.values())) for points in along.values() if points]
        if plain:
            for a, there in _between(along).items():
                keys = [(method, seed, a) for seed in there]
                again = _again(rows, keys, wanted, scale)
                stacked = np.stack(list(there.values()))
                between.append(_member(f"{method} at {a:g}", stacked, tuple(there), runs, again))
    sorted_out = tuple(base), tuple(methods), tuple(between)
    return Sides(domains, scale, *sorted_out, curves, tuple(notes), rows)


def _again(
    rows: Draws | None, keys: Sequence[Key], wanted: Sequence[str], scale: Scale
) -> np.ndarray | None:
    """(draws, keys, columns) on the scale; None where rows are not drawn."""
    if rows is None or not rows.scores:
        return None
    return np.stack([scale.up(rows.of(key, wanted)) for key in keys], 1)


def _member(
    name: str,
    scores: np.ndarray,
    seeds: tuple[int, ...],
    runs: Sequence[Run],
    again: np.ndarray | None,
) -> Member:
    # what orders the arms of one budget: a sweep varies the learning rate
    rate = float((runs[0].recipe.get("optimizer") or {}).get("lr") or 0.0)
    seen, spent = (float(np.mean([of(run) for run in runs])) for of in (samples, examples))
    return Member(Arm(name, scores, rate, again), seeds, seen, spent)


def _interpolation(
    run: Run, table: Table, wanted: Sequence[str], scale: Scale
) -> dict[float, np.ndarray]:
    """Point -> its scores, of the points that have all of them."""
    layout, found = table.layout, {}
    for a, scores in sorted(run.interpolation.items()):
        values = run.values(layout.metric, layout.column, scores)
        scaled = scale.up(np.array([values.get(c, math.nan) for c in wanted]))
        if np.isfinite(scaled).all():
            found[a] = scaled
    return found


def _between(
    along: Mapping[int, Mapping[float, np.ndarray]],
) -> dict[float, dict[int, np.ndarray]]:
    """Every point strictly between the two models -> seed -> its scores."""
    return {
        a: {seed: points[a] for seed, points in along.items() if a in points}
        for a in sorted({a for points in along.values() for a in points if 0 < a < 1})
    }

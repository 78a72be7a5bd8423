"""A table's scores where the rows of its test sets are drawn anew: in one draw the same rows for
every run, because all are scored on the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tram_ds.comparison.collect import Table
from tram_ds.comparison.row_files import Rows
from tram_ds.evaluation.row_scores import RowScores

Array = np.ndarray
Key = tuple[str, int, float]  # method, seed, point between the pre-trained model and the run: 1
RESAMPLES = 1000
# 32 MiB of float64
AT_ONCE = 1 << 22  # how often a row is drawn, held at a time
NAMED = 3  # runs that a note names


@dataclass(frozen=True)
class Draws:
    """scores: (draws, columns) of every key, in the table's unit. lacking: why there are none."""

    columns: tuple[str, ...] = ()
    scores: Mapping[Key, Array] = field(default_factory=dict)
    lacking: str = ""

    @property
    def drawn(self) -> str:
        """What an interval with them is over."""
        return "seeds and rows" if self.scores else "seeds"

    def of(self, key: Key, columns: Sequence[str]) -> Array:
        """(draws, columns)."""
        return self.scores[key][:, [self.columns.index(c) for c in columns]]


def draws(table: Table, between: bool, resamples: int = RESAMPLES) -> Draws:
    """Where every run has scores of rows, of the same rows. Each column's rows are drawn by
    themselves: nothing says whether those of two columns belong together. between: of the points
    between the pre-trained model and base runs too."""
    layout = table.layout
    columns = tuple(c for c in table.values if c != layout.summary)
    found, places = _members(table, between)
    bare = [k for k, of in found.items() if not set(columns) <= set(of)]
    if bare:
        return Draws(lacking=_bare([places[k] for k in bare], len(found)))
    for column in columns:
        first, *others = found
        for key in others:
            if found[key][column].digest != found[first][column].digest:
                other = f"other rows of {column} than {places[first]}"
                return Draws(lacking=f"{places[key]} was scored on {other}")
    accuracy = layout.metric == "accuracy"
    by_column = [
        _resampled([of[column] for of in found.values()], accuracy, resamples, number)
        for number, column in enumerate(columns)
    ]
    stacked = np.stack(by_column, 2)  # (draws, keys, columns)
    return Draws(columns, {key: stacked[:, i] for i, key in enumerate(found)})


def _members(table: Table, between: bool) -> tuple[dict[Key, Rows], dict[Key, str]]:
    """(key -> column -> rows, key -> where they are from)."""
    found: dict[Key, Rows] = {}
    places: dict[Key, str] = {}
    for method, runs in table.runs.items():
        for run in runs:
            plain = run.recipe["algorithm"]["name"] == "base"
            points = [a for a in run.interpolation if 0 < a < 1] if between and plain else []
            for a in (1.0, *points):
                key = method, run.seed, a
                named = {table.layout.column(d): of for d, of in run.rows.get(a, {}).items()}
                found[key] = found.get(key, {}) | named
                places[key] = run.where if a == 1 else f"{run.where} at {a:g}"
    return found, places


def _bare(places: Sequence[str], whole: int) -> str:
    if len(places) == whole:
        return "runs keep one score a domain"
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return f"{', '.join(places[:NAMED])}{more} of {whole} keep one score a domain"


def _resampled(of: Sequence[RowScores], accuracy: bool, resamples: int, seed: int) -> Array:
    """(resamples, runs) scores of one column."""
    # float64: files have float32, and thousands of rows are added up
    value = np.stack([rows.value for rows in of], 1).astype(float)
    weight = np.stack([rows.weight for rows in of], 1).astype(float)
    rng, n = np.random.default_rng(seed), len(value)
    found = []
    step = max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        counts = np.empty((min(step, resamples - start), n))
        for draw in counts:
            # how often each row is drawn: one product with it is the same draw for all runs
            draw[:] = np.bincount(rng.integers(n, size=n), minlength=n)
        with np.errstate(all="ignore"):
            # of sums: a row that is drawn twice brings its losses and its targets twice
            found.append((counts @ value) / (counts @ weight))
    with np.errstate(over="ignore"):
        scores = np.concatenate(found)
        return 100.0 * scores if accuracy else np.exp(scores)

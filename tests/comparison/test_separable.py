"""Best and worst are marked where the seeds tell them apart: against intervals computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from tram_ds.comparison import separable
from tram_ds.comparison.blocks import number
from tram_ds.comparison.collect import Table
from tram_ds.comparison.layouts import own_layout


def made(scores: dict[str, list[float]], metric: str = "accuracy") -> Table:
    """method -> its score by seed, in one column."""
    layout = own_layout("made", metric, ["a", "b"], ["a"])
    values = pd.concat(
        {m: pd.DataFrame({"b": of}, index=range(len(of))) for m, of in scores.items()},
        names=["method", "seed"],
    )
    runs: dict[str, Any] = {method: [] for method in scores}
    return Table(layout, values, runs, None)


def marks(table: Table) -> tuple[dict[str, str], list[str]]:
    rows = [(method, [number(float(table.of(method)["b"].mean()), 2)]) for method in table.methods]
    rows, notes = separable.marked(rows, ["b"], table)
    return {label: cells[0].mark for label, cells in rows}, notes


def test_two_seeds_that_disagree_do_not_separate() -> None:
    """Differences 1 and 3: the interval of two values is 2 plus or minus 12.7."""
    found, notes = marks(made({"sam": [80.0, 80.0], "asam": [81.0, 83.0]}))
    assert set(found.values()) == {""}
    assert notes == ["no best or worst, not separable (n = 2): in any column"]


def test_what_is_not_told_from_the_best_is_marked_like_it() -> None:
    """sam - asam is 0.5 and -0.3: nothing; both are 5 above adam, give or take 0.5; three pairs."""
    scores = {
        "adam": [75.0, 75.1, 74.9, 75.0],
        "sam": [80.0, 80.6, 79.8, 80.2],
        "asam": [80.4, 80.3, 80.1, 80.0],
    }
    for other, gap in (("sam", 0.05), ("adam", 4.0)):
        differences = [a - b for a, b in zip(scores["asam"], scores[other], strict=True)]
        half = stats.t.ppf(1 - 0.05 / 3 / 2, 3) * stats.sem(differences)
        assert (abs(sum(differences) / 4) > half) == (gap == 4.0)
    found, notes = marks(made(scores))
    assert found == {"adam": "worst", "sam": "best", "asam": "best"} and notes == []


def test_a_row_like_both_ends_is_not_marked() -> None:
    """The middle one swings by 2 between ends that never move."""
    found, _ = marks(made({"adam": [79.0] * 3, "sam": [79.0, 80.0, 81.0], "asam": [81.0] * 3}))
    assert found == {"adam": "worst", "sam": "", "asam": "best"}


def test_seeds_are_paired_and_those_of_one_row_alone_do_not_count() -> None:
    """asam is 1 better in both pairs; a bad third seed takes its mean below sam's."""
    found, notes = marks(made({"sam": [80.0, 90.0], "asam": [81.0, 91.0, 99.0]}))
    assert found == {"sam": "worst", "asam": "best"} and notes == []
    found, notes = marks(made({"sam": [80.0, 90.0], "asam": [81.0, 91.0, 60.0]}))
    assert set(found.values()) == {""} and "(n = 2)" in notes[0]
    found, notes = marks(made({"sam": [80.0], "asam": [81.0, 91.0]}))
    assert notes == ["no best or worst, not separable (n = 1): in any column"]


def test_perplexities_are_told_apart_by_their_ratio() -> None:
    """Always 2 % lower: differences of 0.2 and 20, logarithms that are equal."""
    scores = {"sam": [10.0, 1000.0], "tram_x": [9.8, 980.0]}
    assert math.isclose(9.8 / 10.0, 980.0 / 1000.0)
    found, _ = marks(made(scores, "perplexity"))
    assert found == {"sam": "worst", "tram_x": "best"}


@pytest.mark.parametrize("scores", [{"sam": [80.0, 81.0]}, {"sam": [80.0], "asam": [math.nan]}])
def test_one_row_is_no_contest(scores: dict[str, list[float]]) -> None:
    assert marks(made(scores)) == (dict.fromkeys(scores, ""), [])

"""Correlation over methods of runs whose scores are on known lines."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from scipy import stats

from tram_ds.comparison import correlation, plots, views
from tram_ds.comparison.layouts import own_layout

X = {
    "adam": 10.0,
    "sam": 9.0,
    "r3f": 8.0,
    "tram_prev": 7.0,
    "tram_x": 6.0,
    "tram_init": 5.5,
    "asam_trpo": 100.0,
    "pretrained": 50.0,
}


def means() -> pd.DataFrame:
    """near = x + 1, opposite = 30 - 2 x, and TRAM half a point below each; constant says
    nothing."""
    rows = {}
    for method, x in X.items():
        low = 0.5 * method.startswith("tram_")
        rows[method] = {
            "home": x,
            "near": x + 1 - low,
            "opposite": 30 - 2 * x - low,
            "constant": 4.0,
        }
    return pd.DataFrame(rows).T


LAYOUT = own_layout("made", "perplexity", ["home", "near", "opposite", "constant"], ["home"])


def test_rho_is_scipys_and_leaves_out_pretrained_and_combinations() -> None:
    found = correlation.table(means(), LAYOUT)
    kept = means().drop(["asam_trpo", "pretrained"])
    assert (found["n"] == 6).all()
    for domain in ("near", "opposite"):
        want = stats.pearsonr(kept["home"], kept[domain])
        assert found.loc[domain, "rho"] == pytest.approx(want.statistic)
        assert found.loc[domain, "p"] == pytest.approx(want.pvalue)
    assert math.isnan(found.loc["constant", "rho"])


def test_panels_hold_the_domains_that_follow_and_those_that_go_against() -> None:
    together, against = correlation.panels(means(), LAYOUT)
    assert together.title == "average of 1 with rho > 0" and against.title == "opposite"
    assert (together.earlier.slope, against.earlier.slope) == (pytest.approx(1), pytest.approx(-2))
    assert (together.tram.slope, against.tram.slope) == (pytest.approx(1), pytest.approx(-2))
    assert together.tram_below == pytest.approx(0.5) and against.tram_below == pytest.approx(0.5)
    assert together.earlier.n == together.tram.n == 3


def test_two_methods_are_said_to_be_too_few() -> None:
    block = views.correlations(means().loc[["adam", "sam", "pretrained"]], LAYOUT)
    assert not block.rows and block.notes == ("not enough methods (2; 3 needed)",)
    panels = correlation.panels(means().loc[["adam", "sam", "r3f", "tram_x"]], LAYOUT)
    assert views.trends(panels, LAYOUT).rows[0][1][0].text == "3 / 1"
    assert math.isnan(panels[0].tram.slope)


@pytest.mark.parametrize("lost", ["near", "opposite"])
def test_a_panel_of_scores_that_nobody_has_is_empty(lost: str) -> None:
    """An infinite perplexity is no point; where every method has one, no point is left."""
    broken = means()
    broken[lost] = math.nan
    panel = correlation.panel(broken, LAYOUT, "made", ["near", "opposite"])
    assert len(panel.points) == panel.earlier.n == panel.tram.n == 0
    assert math.isnan(panel.earlier.slope) and math.isnan(panel.tram_below)
    assert views.trends([panel], LAYOUT).rows[0][1][0].text == "0 / 0 (not enough methods)"
    assert len(plots.figure2([panel], LAYOUT).axes) == 1

"""compare on runs with scores of single rows: what is drawn, what the tables say of it, and what
they say where a run has none, or of other rows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests import made_runs
from tram_ds.comparison import comparison, runs
from tram_ds.comparison.blocks import Block
from tram_ds.comparison.collect import Table, gather, parts
from tram_ds.comparison.row_draws import draws
from tram_ds.evaluation import row_scores
from tram_ds.evaluation.row_scores import RowScores

RATES = {1e-5: 2.80, 2e-5: 2.65, 5e-5: 2.55}  # -> log in-domain perplexity
ONE, OTHER = "95 %, seeds", "95 %, seeds and rows"


def write(folder: Path, rows: bool = True) -> list[Path]:
    """Base at three rates and tram_x 2 % below its curve, five seeds each."""
    rng, made = np.random.default_rng(0), []
    for seed in range(5):
        for name, lr, x, off in (
            *(("base", lr, x, 0.0) for lr, x in RATES.items()),
            ("tram_x", 2e-5, 2.6, -0.02),
        ):
            recipe = made_runs.recipe(name, seed)
            recipe["optimizer"]["lr"] = lr
            inside = x + rng.normal(0, 0.002)
            outside = 3.0 + 0.6 * (inside - 2.4) + off
            scores = {"home": inside, **{d: outside + rng.normal(0, 0.002) for d in ("a", "b")}}
            found = {d: math.exp(v) for d, v in scores.items()}
            made.append(made_runs.write(folder, recipe, found))
            if rows:
                made_runs.keep_rows(made[-1], rng)
    return made


def table(folder: Path) -> Table:
    ((layout, members),) = parts(runs.from_folders([f"{folder}/*"])[0], "auto")
    return gather(members, layout)


def blocks(folder: Path) -> dict[str, Block]:
    (section,) = comparison.compare(runs.from_folders([f"{folder}/*"])[0], frontier=True)
    return {b.name: b for b in section.blocks}


def block(folder: Path, name: str) -> Block:
    return blocks(folder)[name]


def width(of: Block, column: str) -> float:
    text = dict(of.rows)["tram_x"][of.columns.index(column)].text
    low, high = map(float, re.findall(r"[-+]?\d+\.\d+", text))
    return high - low


def test_intervals_say_that_rows_are_drawn_and_are_wider(tmp_path: Path) -> None:
    write(tmp_path / "with")
    write(tmp_path / "without", rows=False)
    bare, whole = (blocks(tmp_path / f) for f in ("without", "with"))
    one, other = bare["frontier_steps"], whole["frontier_steps"]
    assert ONE in one.columns and OTHER in other.columns and ONE not in other.columns
    # 40 rows that differ by 0.1: 0.016 a score, against 0.002 of the seeds
    assert width(other, OTHER) > 2 * width(one, ONE)
    (said,) = [n for n in other.notes if "drawn" in n]
    assert said.startswith("seeds, domains and the rows of the test sets are drawn: in one draw")
    tested, alone = whole["significance"], bare["significance"]
    assert {"95 % bootstrap, seeds and rows", "bootstrap, seeds and rows"} <= set(tested.columns)
    assert {"95 % bootstrap, seeds", "bootstrap, seeds"} <= set(alone.columns)
    assert width(tested, "95 % bootstrap, seeds and rows") > 2 * width(
        alone, "95 % bootstrap, seeds"
    )


def test_runs_without_rows_or_with_other_rows_are_named(tmp_path: Path) -> None:
    made = write(tmp_path)
    (made[2] / "rows.npz").unlink()
    of = block(tmp_path, "frontier_steps")
    (said,) = [n for n in of.notes if "drawn" in n]
    assert ONE in of.columns
    assert said.startswith(
        "seeds and domains are drawn, single rows of a test set are not: "
        f"{made[2]} of 20 keep one score a domain; the sampling error"
    )
    made_runs.keep_rows(made[2], np.random.default_rng(0), digest=" of another year")
    (said,) = [n for n in block(tmp_path, "frontier_steps").notes if "drawn" in n]
    assert f"{made[2]} was scored on other rows of home than" in said


def test_rows_of_other_scores_are_not_used(tmp_path: Path) -> None:
    made = write(tmp_path)
    results = json.loads((made[0] / "results.json").read_text())
    results["scores"]["test"]["a"]["perplexity"] *= 1.01
    (made[0] / "results.json").write_text(json.dumps(results))
    (made[1] / "rows.npz").write_bytes(b"cut off")
    found, notes = runs.from_folders([f"{tmp_path}/*"])
    assert len(found) == 20, "their scores are as good as ever"
    assert f"{made[0]}: rows.npz: its rows of a do not make that domain's score" in notes
    assert any(n.startswith(f"{made[1]}: rows.npz: cannot be read") for n in notes)


def test_a_draw_has_the_same_rows_for_every_run(tmp_path: Path) -> None:
    """Run 1 is run 0 with a loss 0.25 higher on every row: so it is in every draw. The mean of
    draws is the score, their deviation that of a mean of 30 rows; domains are drawn apart."""
    rng = np.random.default_rng(0)
    losses = {d: rng.normal(3, 0.5, 30) for d in ("home", "a")}
    for seed in (0, 1):
        moved = {d: v + 0.25 * seed for d, v in losses.items()}
        scores = {d: float(np.exp(v.mean())) for d, v in moved.items()}
        made = made_runs.write(tmp_path, made_runs.recipe("base", seed), scores)
        rows = {d: RowScores(v, np.ones(30, int), d) for d, v in moved.items()}
        (made / "rows.npz").write_bytes(row_scores.packed({"test": rows}))
    found = draws(table(tmp_path), between=False)
    first, second = (np.log(found.scores["adam", seed, 1.0]) for seed in (0, 1))
    assert found.columns == ("home", "a") and first.shape == (1000, 2)
    assert np.allclose(second - first, 0.25)
    means, deviations = (np.array([f(v) for v in losses.values()]) for f in (np.mean, np.std))
    assert np.allclose(first.mean(axis=0), means, atol=4 * 0.1 / 1000**0.5)
    assert np.allclose(first.std(axis=0), deviations / 30**0.5, rtol=0.15)
    assert abs(np.corrcoef(first.T)[0, 1]) < 4 / 1000**0.5


def test_points_between_two_models_have_rows_of_their_own(tmp_path: Path) -> None:
    """As evaluate writes them beside its report; without them the table has none, and says so."""
    made = write(tmp_path)
    scores = json.loads((made[0] / "results.json").read_text())["scores"]["test"]
    half = {d: {"perplexity": 1.1 * s["perplexity"]} for d, s in scores.items()}
    entry = {"name": "half", "path": str(made[0] / "export"), "interpolation": 0.5, "scores": half}
    (made[0] / "analysis").mkdir()
    report = {"split": "test", "metric": "perplexity", "models": [entry]}
    (made[0] / "analysis" / "interpolation.json").write_text(json.dumps(report))
    assert f"{made[0]} at 0.5 of 21 keep one score a domain" == draws(table(tmp_path), True).lacking
    assert draws(table(tmp_path), between=False).scores
    own = row_scores.read(made[0] / "rows.npz")["test"]
    rows = {
        d: RowScores(of.value + math.log(1.1) * of.weight, of.weight, of.digest)
        for d, of in own.items()
    }
    beside = made[0] / "analysis" / "interpolation.rows.npz"
    beside.write_bytes(row_scores.packed({"0": rows}))
    found = draws(table(tmp_path), between=True)
    key = next(k for k in found.scores if k[2] == 0.5)
    ratio = found.scores[key] / found.scores[key[0], key[1], 1.0]
    assert ratio == pytest.approx(1.1, rel=1e-5)
    of = block(tmp_path, "frontier_steps")
    assert OTHER in of.columns and any(row.endswith("at 0.5") for row, _ in of.rows)

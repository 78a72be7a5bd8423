"""compare --frontier on run folders whose residuals are planted: blocks, notes of what is missing,
the figure, the page."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests import made_runs
from tests.browser import at_three_widths
from tram_ds.cli import main as tram
from tram_ds.comparison import comparison, report, runs
from tram_ds.comparison.blocks import Block
from tram_ds.comparison.collect import gather, parts
from tram_ds.comparison.comparison import Section
from tram_ds.comparison.frontier_runs import sides
from tram_ds.jobs import sweep
from tram_ds.recipe.recipe import dump

RATES = {1e-5: 2.80, 2e-5: 2.65, 5e-5: 2.55, 1e-4: 2.48, 2e-4: 2.45}  # -> log in-domain perplexity
DOMAINS = {"near": 0.0, "far": 0.4, "law": 0.2}
INITIAL = {"home": 16.0, "near": 30.0, "far": 40.0, "law": 35.0}
STEPS = (8, 19)  # 19 / 8 is TRAM's 7 / 3 and 2 %
METHODS = {"asam": (2.56, 0.0), "tram_x": (2.52, -0.02), "kl_init": (2.62, 0.004)}


def scores(rng: np.random.Generator, x: float, residual: float) -> dict[str, float]:
    """A run near a point of the frontier: 3 + 0.6 (x - 2.4), so much above it."""
    inside = x + rng.normal(0, 0.002)
    outside = {
        d: 3.0 + 0.6 * (inside - 2.4) + residual + off + rng.normal(0, 0.002)
        for d, off in DOMAINS.items()
    }
    return {d: math.exp(v) for d, v in {"home": inside, **outside}.items()}


def made(
    folder: Path, algorithm: str, seed: int, lr: float, steps: int, found: dict[str, float]
) -> Path:
    recipe = made_runs.recipe(algorithm, seed)
    recipe["optimizer"]["lr"], recipe["train"]["steps"] = lr, steps
    return made_runs.write(folder, recipe, found, initial=INITIAL if len(found) > 1 else None)


def interpolated(run: Path, found: dict[str, float]) -> None:
    """evaluate's report of the run: straight lines between the pre-trained model and the run."""
    points = (0.0, 0.5, 0.75, 1.0)
    models = [
        {
            "name": f"{run.name} at {a:g}",
            "path": str(run / "export"),
            "interpolation": a,
            "scores": {d: {"perplexity": (1 - a) * INITIAL[d] + a * v} for d, v in found.items()},
        }
        for a in points
    ]
    (run / "analysis").mkdir()
    report = {"split": "test", "metric": "perplexity", "models": models}
    (run / "analysis" / "interpolation.json").write_text(json.dumps(report))


def write(folder: Path, seeds: int = 3, budgets: tuple[int, ...] = STEPS) -> Path:
    """A sweep: base at five rates and each number of steps, three methods."""
    rng = np.random.default_rng(2)
    for seed in range(seeds):
        for steps in budgets:
            for lr, x in RATES.items():
                # longer training follows a curve 0.01 lower
                found = scores(rng, x, -0.01 if steps == 19 else 0.0)
                run = made(folder, "base", seed, lr, steps, found)
                if lr == 5e-5 and steps == 8:
                    interpolated(run, found)
        for name, (x, residual) in METHODS.items():
            made(folder, name, seed, 5e-5, 8, scores(rng, x, residual))
    return folder


def compared(folder: Path) -> Section:
    (found,) = comparison.compare(runs.from_folders([f"{folder}/*"])[0], frontier=True)
    return found


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> Section:
    return compared(write(tmp_path_factory.mktemp("frontier")))


def block(section: Section, name: str) -> Block:
    (found,) = [b for b in section.blocks if b.name == name]
    return found


def cells(of: Block, row: str) -> dict[str, str]:
    return {c: cell.text for c, cell in zip(of.columns, dict(of.rows)[row], strict=True)}


def test_a_planted_residual_is_off_and_none_is_not(section: Section) -> None:
    of = block(section, "frontier_steps")
    assert [row for row, _ in of.rows] == [
        "asam",
        "kl_init",
        "tram_x",
        "adam (optimizer.lr=5e-05, train.steps=8) at 0.5",
        "adam (optimizer.lr=5e-05, train.steps=8) at 0.75",
    ]
    off = cells(of, "tram_x")
    assert off["verdict"] == "off, better" and off["n"] == "3" and off["compute"] == "2.33 x"
    low, high = map(float, off["95 %, seeds"].strip("[]%\N{NO-BREAK SPACE}").split(","))
    assert low < -2.0 < high < 0.0
    assert not cells(of, "asam")["verdict"].startswith("off")


def test_the_answer_depends_on_the_compute_of_the_baseline(section: Section) -> None:
    """Base with 2.4 times the steps lies 1 % lower, so half of tram_x's 2 % is left."""
    steps, flops = (dict(block(section, f"frontier_{k}").rows) for k in ("steps", "flops"))
    gained = flops["tram_x"][1].value - steps["tram_x"][1].value
    assert gained == pytest.approx(1.0, abs=0.4)
    assert flops["kl_init"][0].text == "no frontier: see the notes"
    (note,) = [n for n in block(section, "frontier_flops").notes if "kl_init" in n]
    assert note.startswith("missing: base arms at equal FLOPs (1.33 x) of kl_init")
    assert note.endswith("there are 1 x, 2.38 x")


def test_the_tables_say_what_is_not_drawn(section: Section) -> None:
    for name in ("frontier_steps", "frontier_flops"):
        (note,) = [n for n in block(section, name).notes if "drawn" in n]
        assert note.startswith("seeds and domains are drawn, single rows of a test set are not")


def test_domain_by_domain(section: Section) -> None:
    of = block(section, "frontier_steps_domains")
    assert of.columns == tuple(DOMAINS)
    assert all(text.startswith("-") for text in cells(of, "tram_x").values())
    assert any(text.endswith("*") for text in cells(of, "tram_x").values())
    assert not any(text.endswith("*") for text in cells(of, "asam").values())


def test_interpolations_are_rows_and_curves(tmp_path: Path) -> None:
    """At 0.5 of 30 and the run's own: read where evaluate wrote it."""
    folder = write(tmp_path, seeds=1, budgets=(8,))
    found, _ = runs.from_folders([f"{folder}/*"])
    ((layout, members),) = parts(found, "auto")
    both = sides(gather(members, layout))
    half = both.interpolated[0]
    run = next(m for m in both.base if m.arm.name == "adam (optimizer.lr=5e-05)")
    mine = np.exp(run.arm.scores[0])
    assert half.arm.name == "adam (optimizer.lr=5e-05) at 0.5"
    start = np.array(list(INITIAL.values()))
    assert np.allclose(np.exp(half.arm.scores[0]), (mine + start) / 2)
    ((curve,),) = [c for c in both.curves.values() if c]
    assert np.allclose(np.exp(curve[0]), start) and np.allclose(np.exp(curve[-1]), mine)


def test_one_seed_and_few_arms_say_what_is_missing(tmp_path: Path) -> None:
    folder = write(tmp_path, seeds=1, budgets=(8,))
    found = compared(folder)
    verdicts = {row: c[0].text for row, c in block(found, "frontier_steps").rows}
    assert verdicts["tram_x"] == "not separable: one seed a base arm"
    flops = block(found, "frontier_flops")
    assert dict(flops.rows)["tram_x"][0].text == "no frontier: see the notes"
    few = tmp_path / "few"
    rng = np.random.default_rng(0)
    for name, lr in (("base", 1e-5), ("tram_x", 1e-5)):
        made(few, name, 0, lr, 8, scores(rng, 2.5, 0.0))
    of = block(compared(few), "frontier_steps")
    assert "missing: base arms with 32 examples: 2 that differ in-domain" in "\n".join(of.notes)
    assert "missing: interpolation curves" in "\n".join(
        block(compared(few), "frontier_flops").notes
    )


def test_without_a_base_arm_all_is_missing(tmp_path: Path) -> None:
    made(tmp_path, "tram_x", 0, 1e-5, 8, scores(np.random.default_rng(0), 2.5, 0.0))
    of = block(compared(tmp_path), "frontier_steps")
    assert any("base arms at equal steps" in n and "there are none" in n for n in of.notes)


def test_a_run_without_a_number_is_left_out_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, budgets=(8,))
    run = next(folder.glob("made-asam-1"))
    results = json.loads((run / "results.json").read_text())
    results["scores"]["test"]["far"]["perplexity"] = None
    (run / "results.json").write_text(json.dumps(results))
    of = block(compared(folder), "frontier_steps")
    assert cells(of, "asam")["n"] == "2"
    assert "without a score in every column: asam, seed 1" in of.notes


def test_the_figure_has_a_point_a_run(section: Section) -> None:
    (drawing,) = [d for d in section.drawings if d.name == "frontier"]
    (ax,) = drawing.figure.axes
    points = sum(len(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "None")
    assert points == 3 * (2 * len(RATES) + len(METHODS))
    assert len(ax.collections) == 2, "two bands"
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert len(dotted) == 3


def test_the_page_shows_the_frontier_before_the_other_figures(
    section: Section, tmp_path: Path
) -> None:
    """Scores, then the figure and the verdicts, then all else; names are broken between words."""
    page = report.write([section], tmp_path, "compare --frontier").read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    asked = [c for c in captions if "frontier of plain training" in c]
    assert captions[0] == "mean over seeds" and captions[1 : 1 + len(asked)] == asked
    assert len(asked) == 1 + 4 and asked[0].startswith("Zero-shot against in-domain")
    assert "adam (optimizer.<wbr>lr=<wbr>5e-05, train.<wbr>steps=<wbr>8) at 0.5</th>" in page


def test_rows_are_in_the_order_of_their_numbers(section: Section) -> None:
    rates = [row for row, _ in block(section, "scores").rows if "train.steps=8" in row]
    assert [row.partition("lr=")[2].partition(",")[0] for row in rates] == [
        "1e-05",
        "2e-05",
        "5e-05",
        "0.0001",
        "0.0002",
    ]


@pytest.mark.integration
def test_a_browser_shows_the_frontier_at_three_widths(section: Section, tmp_path: Path) -> None:
    page = report.write([section], tmp_path / "out", "compare --frontier")
    texts = ("off the frontier of plain training at equal FLOPs", "no frontier: see the notes")
    asyncio.run(at_three_widths(page, tmp_path, "light", *texts))


def test_accuracies_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Points, positive is better: tram_x 3 above what base has at 70 %."""
    rng = np.random.default_rng(4)
    for seed in range(3):
        for algorithm, lr, x, above in (
            *(("base", 10.0**-i, 60 + 5 * i, 0) for i in range(1, 5)),
            ("tram_x", 0.1, 70, 3),
        ):
            recipe = made_runs.recipe(algorithm, seed, "entailment", data="facebook/xnli")
            recipe["optimizer"]["lr"] = lr
            inside = x + rng.normal(0, 0.2)
            found = {"en": inside, "sw": inside - 10 + above, "ur": inside - 14 + above}
            noisy = {d: (v + rng.normal(0, 0.1)) / 100 for d, v in found.items()}
            made_runs.write(tmp_path, recipe, noisy, "accuracy", train="en")
    words = ["compare", f"{tmp_path}/*", "--frontier", "--only", "frontier_steps"]
    assert tram.main(words) == 0
    said = capsys.readouterr().out
    assert "off, better" in said and "positive is better" in said
    of = block(compared(tmp_path), "frontier_steps")
    assert dict(of.rows)["tram_x"][1].value == pytest.approx(3.0, abs=0.5)


def test_runs_without_other_domains_have_no_frontier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "base", 0, 1e-5, 8, {"home": 10.0})
    assert tram.main(["compare", f"{tmp_path}/*", "--frontier"]) == 2
    assert capsys.readouterr().err.startswith("error: --frontier: needs runs scored on ")


def test_a_partial_sweep_says_what_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three cells two are finished; the third is named, on the page too; of none all are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(
        "task: {name: language_modeling, data: generated, seq_len: 16}\n"
        "model: {init: {architecture: gpt2, n_layer: 1, n_embd: 16, n_head: 2}}\n"
        "algorithm: base\noptimizer: {name: adamw, lr: 1e-3}\n"
        "train: {steps: 3, global_batch: 4, micro_batch: 2}\n"
    )
    (tmp_path / "part.yaml").write_text("base: tiny.yaml\ngrid: {train.seed: [0, 1, 2]}\n")
    assert tram.main(["compare", "--sweep", "part.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: --sweep part.yaml: none of its 3 cells is")
    for cell in sweep.cells(sweep.read("part.yaml"))[:2]:
        folder = made(tmp_path / "made", "base", 0, 1e-3, 3, {"home": 10.0, "far": 20.0})
        folder = folder.rename(tmp_path / f"{cell.recipe.train.seed}")
        cell.run_dir.parent.mkdir(exist_ok=True)
        folder.rename(cell.run_dir)
        (cell.run_dir / "recipe.yaml").write_text(dump(cell.recipe))
        (cell.run_dir / "DONE").touch()
    assert tram.main(["compare", "--sweep", "part.yaml", "--report", "out"]) == 0
    note = "partial: 1 of 3 cells of part.yaml are not finished: runs/tiny-base-2"
    assert note in capsys.readouterr().err
    assert note in (tmp_path / "out" / "report.html").read_text()
    assert tram.main(["compare", "runs/*", "--sweep", "part.yaml"]) == 2
    assert "--sweep part.yaml: names its runs itself" in capsys.readouterr().err

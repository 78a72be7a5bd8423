"""Sweeps: which cells a file means, how they are run, which are skipped, and what the exit code
says."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tram_ds.cli import main as tram
from tram_ds.jobs import slurm_config, sweep
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.file import RecipeError
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import dump
from tram_ds.recipe.sections import EngineSection

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "recipes" / "sweeps").glob("table*.yaml"))
FRONTIERS = sorted((ROOT / "recipes" / "sweeps").glob("frontier*.yaml"))
ALL = (
    "adam sam asam fsam trpo r3f mesa asam_trpo asam_r3f asam_mesa tram_prev tram_init tram_x "
    "tram_fisher"
)
PAPER = {  # file -> cells, and the rows of the paper's table
    "table3_images": (120, "sgd sam asam fsam tram_prev tram_init tram_x tram_fisher"),
    "table4_11_m2d2": (28, ALL),
    "table5_12_xnli": (280, ALL),
    "table10_gpt2xl": (9, "adam sam asam fsam trpo r3f mesa tram_prev tram_x"),
    "table14_xnli_distances": (60, "tram_x"),
}

FAKE = """
import json, os, pathlib, signal, sys, time
words = sys.argv[2:]
key = " ".join(w for w in words if not w.startswith("--re") or w == "--recipe")
folder, algorithm, recipe = json.load(open("cells.json"))[key]
with open("calls.txt", "a") as file:
    file.write(json.dumps([folder, words]) + chr(10))
if os.environ.get("HANG"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("hanging", flush=True)
    time.sleep(60)
code = json.loads(os.environ.get("CODES", "{}")).get(algorithm, 0)
if code == 0:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    pathlib.Path(folder, "recipe.yaml").write_text(recipe)
    pathlib.Path(folder, "DONE").touch()
sys.exit(code)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a stand-in for the launcher and a sweep of four cells."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    text = "base: xnli_xlmr\ngrid:\n  algorithm: [sam, tram_x]\n  train.seed: [0, 1]\n"
    (tmp_path / "four.yaml").write_text(text)
    return tmp_path


def calls(place):
    path = place / "calls.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tell_the_fake(overrides=()):
    """What a run would find out for itself: the folder and the algorithm of every command line."""
    known = {}
    for cell in sweep.cells(sweep.read("four.yaml"), overrides):
        recipe = load(cell.base, cell.overrides)
        assert recipe.resolved_run_dir() == cell.run_dir
        known[" ".join(["--recipe", cell.base, *cell.overrides])] = (
            str(cell.run_dir),
            recipe.algorithm.name,
            dump(recipe),
        )
    Path("cells.json").write_text(json.dumps(known))


def run(*words):
    launcher = f"{sys.executable} fake.py"
    return tram.main(["sweep", "--sweep", "four.yaml", "--launcher", launcher, *words])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_the_papers_tables(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python launch/sweep.py --sweep {path.name}")
    read = sweep.read(path.stem)
    count, rows = PAPER[path.stem]
    assert read.grid["algorithm"] == [
        "base" if row in ("sgd", "adam") else row for row in rows.split()
    ]
    sizes = [len(values) for values in read.grid.values()]
    assert len(read.base) * math.prod(sizes) == count
    few = read.model_copy(
        update={"grid": read.grid | {key: read.grid[key][:2] for key in read.grid if "seed" in key}}
    )
    cells = sweep.cells(few)
    assert len({cell.run_dir for cell in cells}) == len(cells)


@pytest.mark.parametrize("path", FRONTIERS, ids=lambda path: path.stem)
def test_a_frontier_has_base_at_five_rates_and_two_lengths(path):
    """And every other row at the base's shorter length, three seeds each."""
    lines = path.read_text().splitlines()
    read = sweep.read(path.stem)
    assert lines[0].startswith(f"# python launch/sweep.py --sweep {path.name}")
    short, long = read.grid["train.steps"]
    assert long == pytest.approx(2.4 * short, rel=1e-3) and len(read.grid["optimizer.lr"]) == 5
    cells = sweep.cells(read.with_seeds([0]))
    rows = {cell.recipe.algorithm.name for cell in cells}
    assert {"base", "kl_init", "l2sp", "asam", "mesa", "tram_prev", "tram_x"} <= rows
    others = [cell.recipe for cell in cells if cell.recipe.algorithm.name != "base"]
    assert {recipe.train.steps for recipe in others} == {short}
    assert {recipe.optimizer.lr for recipe in others} <= set(read.grid["optimizer.lr"])
    for recipe in others:
        row = recipe.algorithm
        sized = row.radius == "relative" or row.radius_scale == "auto"
        assert sized == row.name.startswith("tram_"), "TRAM rows have a size"
    assert re.search(rf"\({3 * len(cells)} runs;", lines[1]), f"{3 * len(cells)} runs"
    if path.stem != "frontier_e5":  # registered as it is
        averaged = [r.algorithm for r in others if r.eval.weights == "ema"]
        assert {"msam", "rwp"} <= rows and [(a.name, a.weight) for a in averaged] == [("mesa", 0.0)]


def test_further_grids_follow_with_keys_of_their_own(place):
    (place / "more.yaml").write_text(
        "base: xnli_xlmr\ngrid: {algorithm: [base], optimizer.lr: [1e-5, 2e-5]}\n"
        "also:\n  - {algorithm: [sam, asam]}\n  - {algorithm: [sam], algorithm.rho: [0.1]}\n"
    )
    found = sweep.cells(sweep.read("more.yaml"))
    assert [str(cell.run_dir) for cell in found] == [
        "runs/xnli_xlmr-base-0-lr=1e-05",
        "runs/xnli_xlmr-base-0-lr=2e-05",
        "runs/xnli_xlmr-sam-0",
        "runs/xnli_xlmr-asam-0",
        "runs/xnli_xlmr-sam-0-rho=0.1",
    ]
    seeded = sweep.cells(sweep.read("more.yaml").with_seeds([4]))
    assert {cell.recipe.train.seed for cell in seeded} == {4} and len(seeded) == 5
    (place / "bad.yaml").write_text(
        "base: xnli_xlmr\ngrid: {}\nalso:\n  - {algorithm: []}\n  - {run_dir: [a, b]}\n"
    )
    with pytest.raises(RecipeError) as caught:
        sweep.read("bad.yaml")
    assert "0.algorithm" in str(caught.value) and "1.run_dir" in str(caught.value)


def test_the_hours_of_a_sweep_come_before_it(place, capsys):
    """TRAM's 7 / 3 of base's; 2.4 times the steps are 2.4 times the hours; an unknown length is
    said."""
    (place / "plan.yaml").write_text(
        "base: m2d2_s2orc_gpt2\ngrid: {algorithm: [base, tram_x]}\n"
        "also:\n  - {algorithm: [base], train.steps: [120000]}\n"
        "  - {algorithm: [base], train.steps: [null], train.epochs: [2]}\n"
    )
    words = ["sweep", "--sweep", "plan.yaml", "--dry-run"]
    assert tram.main([*words, "--hours", "h100"]) == 0
    head, base, tram_x, long, unknown, total, *cells = capsys.readouterr().out.splitlines()
    assert head == "GPU hours of the cells to run:" and len(cells) == 5
    hours = [float(line.split()[0]) for line in (base, tram_x, long, total)]
    assert hours[1] == pytest.approx(7 / 3 * hours[0], abs=0.02)
    assert hours[2] == pytest.approx(2.4 * hours[0], abs=0.02)
    assert hours[3] == pytest.approx(sum(hours[:3]), abs=0.02)
    assert unknown.startswith("unknown  ") and "train.epochs" in unknown
    assert "in all, of 3 of 4 cells, and 1 whose hours are not known" in total
    assert tram.main([*words, "--hours", "b200"]) == 2
    assert "b200" in capsys.readouterr().err


def test_the_rows_above_are_those_of_the_csv_files():
    folder = ROOT.parent / "shared" / "paper"
    if not folder.is_dir():
        pytest.skip("the paper's tables are not beside the checkout")
    files = {
        "table3_images": "table3_vision_top1.csv",
        "table5_12_xnli": "table12_xnli_accuracy.csv",
    }
    files |= {
        "table10_gpt2xl": "table10_m2d2_s2orc_gpt2xl_perplexity.csv",
        "table4_11_m2d2": "table11_m2d2_wiki_perplexity.csv",
    }
    for name, file in files.items():
        rows = [row["method"] for row in csv.DictReader((folder / file).open())]
        assert [row for row in rows if row != "pretrained"] == PAPER[name][1].split()


def test_cells_run_in_order_each_in_its_own_folder(place):
    tell_the_fake()
    assert run() == 0
    folders = [folder for folder, _ in calls(place)]
    assert folders == [
        f"runs/xnli_xlmr-{name}-{seed}" for name in ("sam", "tram_x") for seed in (0, 1)
    ]


def test_further_keys_become_part_of_the_folder(place):
    text = (
        "base: [xnli_xlmr, flowers_vit]\ngrid:\n  algorithm.distance: [l2, mmd]\n  algorithm: "
        "[tram_x]\n  optimizer.lr: [1e-5]\n"
    )
    (place / "four.yaml").write_text(text)
    tell_the_fake(["train.seed=3"])
    assert run("train.seed=3") == 0
    assert {folder for folder, _ in calls(place)} == {
        f"runs/{base}-tram_x-3-distance={distance}-lr=1e-05"
        for base in ("xnli_xlmr", "flowers_vit")
        for distance in ("l2", "mmd")
    }
    for _, words in calls(place):
        assert f"distance={load(words[1], words[2:]).algorithm.distance}-" in words[-1], (
            "a section before its keys"
        )


def test_finished_cells_are_skipped_and_begun_ones_resumed(place, capsys):
    done, begun = place / "runs/xnli_xlmr-sam-1", place / "runs/xnli_xlmr-tram_x-0"
    done.mkdir(parents=True)
    (done / "recipe.yaml").write_text(dump(load("xnli_xlmr", ["algorithm=sam", "train.seed=1"])))
    (done / "DONE").touch()
    ended = {"step": 40, "of": 100, "why": "it got worse"}
    (done / "results.json").write_text(json.dumps({"stopped_early": ended}))
    (begun / "checkpoints" / "step-00000002").mkdir(parents=True)
    tell_the_fake()
    assert run() == 0
    said = "finished before (stopped early at step 40 of 100: it got worse)"
    assert f"xnli_xlmr-sam-1: {said}" in capsys.readouterr().out
    assert ["--resume" in words for *_, words in calls(place)] == [False, True, False]
    assert run() == 0 and len(calls(place)) == 3


@pytest.mark.parametrize(
    ("then", "differs"),
    [
        (["train.steps=20000"], "train.steps: 20000 -> "),
        (["optimizer.lr=0.5"], "optimizer.lr: 0.5 -> "),
        (["eval.splits=[validation]"], "eval.splits: ['validation'] -> ['test']"),
        (["engine=fsdp2", "tracking.enabled=false", "eval.batch=3"], ""),  # other roads, same run
        (None, "recipe.yaml: (absent)"),
    ],
)
def test_finished_is_what_was_asked_for(place, capsys, then, differs):
    there = place / "runs/xnli_xlmr-sam-0"
    there.mkdir(parents=True)
    (there / "results.json").write_text("{}")
    (there / "DONE").touch()
    if then is not None:
        (there / "recipe.yaml").write_text(dump(load("xnli_xlmr", ["algorithm=sam", *then])))
    assert run("--dry-run") == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("another run" if differs else "finished") and differs in line


def test_results_without_an_end_are_not_finished(place, capsys):
    there = place / "runs/xnli_xlmr-sam-0"
    there.mkdir(parents=True)
    (there / "results.json").write_text("{}")
    assert run("--dry-run") == 0
    assert capsys.readouterr().out.startswith("to do")


def test_dry_run_lists_and_runs_nothing(place, capsys):
    assert run("--dry-run", "--smoke") == 0
    out = capsys.readouterr().out
    assert (
        "4 cells, 0 finished" in out and "runs/smoke-xnli_xlmr-tram_x-1" in out and "--smoke" in out
    )
    assert not calls(place) and not (place / "runs").exists()


@pytest.mark.parametrize(
    "words, codes, expected, count",
    [
        ((), {"sam": 3}, 3, 1),
        (("--continue-on-error",), {"sam": 3}, 3, 4),
        (("--continue-on-error",), {"sam": 75}, 75, 1),
    ],
)
def test_exit_codes(place, monkeypatch, words, codes, expected, count):
    monkeypatch.setenv("CODES", json.dumps(codes))
    tell_the_fake()
    assert run(*words) == expected
    assert len(calls(place)) == count


def test_a_signal_reaches_the_run_and_ends_the_sweep(place):
    tell_the_fake()
    command = [
        sys.executable,
        str(ROOT / "launch/sweep.py"),
        "--sweep",
        "four.yaml",
        "--launcher",
        f"{sys.executable} fake.py",
    ]
    process = subprocess.Popen(
        command, env={**os.environ, "HANG": "1"}, stdout=subprocess.PIPE, text=True, cwd=place
    )
    assert process.stdout is not None
    assert any("hanging" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75 and len(calls(place)) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "base: xnli_xlmr\ngird: {algorithm: [sam]}\n",
            r"four\.yaml:2: gird.*unknown key 'gird'.*did you mean 'grid'",
        ),
        ("base: xnli_xlm\ngrid: {algorithm: [sam]}\n", "no such recipe.*did you mean 'xnli_xlmr"),
        ("base: xnli_xlmr\ngrid: {algorithm: sam}\n", "grid.algorithm = 'sam': expected a list"),
        ("base: xnli_xlmr\ngrid: {algorithm: []}\n", "grid.algorithm.*at least one value"),
        ("base: xnli_xlmr\ngrid: {algorithm: [sam, sam]}\n", "has a value twice"),
        (
            "base: xnli_xlmr\ngrid: {algorithm: [sam, smam]}\n",
            "algorithm.name = 'smam': unknown name; did you mean 'sam'",
        ),
        ("base: xnli_xlmr\ngrid: {train.sed: [1]}\n", "unknown key 'sed'.*did you mean 'seed'"),
        (
            "base: m2d2_wiki_gpt2\ngrid: {algorithm: [tram_x], algorithm.distance: [mmd]}\n",
            "mmd compares samples",
        ),
        ("base: xnli_xlmr\ngrid: {run_dir: [a, b]}\n", "grid.run_dir.*cannot be swept"),
        (
            "base: [xnli_xlmr, xnli_xlmr.yaml]\ngrid: {algorithm: [sam]}\n",
            "two cells share the folder",
        ),
        ("base: []\ngrid: {algorithm: [sam]}\n", "base"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(place, capsys, text, message):
    (place / "four.yaml").write_text(text)
    assert run() == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not calls(place)


def test_unknown_files_and_launchers_are_named(place):
    with pytest.raises(RecipeError, match="no such sweep file; did you mean 'table10_gpt2xl"):
        sweep.read("table10_gpt2")
    assert tram.main(["sweep", "--sweep", "four.yaml", "--launcher", "/no/such/launcher"]) == 2


def of_engine(name):
    return lambda config: engine_config(EngineSection(name=name, config=config))


@pytest.mark.parametrize(
    ("read", "what", "folder", "one"),
    [
        (load, "recipe file", "recipes", "quickstart.yaml"),
        (sweep.read, "sweep file", "recipes/sweeps", "table3_images.yaml"),
        (slurm_config.load, "SLURM config", "configs/slurm", "a100_one_node.yaml"),
        (of_engine("zero"), "file", "configs/deepspeed", "zero2_offload.json"),
        (of_engine("fsdp2"), "file", "configs/fsdp2", "shard.yaml"),
    ],
)
def test_a_name_is_looked_for_in_one_way(read, what, folder, one, tmp_path, monkeypatch):
    """In its folder, then where one stands; what is nowhere is refused with what is there."""
    monkeypatch.chdir(tmp_path)
    read(one)
    near = one.replace(".", "x.")
    with pytest.raises(RecipeError) as refused:
        read(near)
    text = str(refused.value)
    assert f"'{near}': no such {what}; did you mean '{one}'?; {folder} has " in text
    there = list((ROOT / folder).glob(f"*{Path(one).suffix}"))
    assert there and all(p.name in text for p in there) and "\n" not in text
    Path(near).write_text((ROOT / folder / one).read_text())
    read(near)
    read(f"./{near}")
    with pytest.raises(RecipeError, match=f"no such {what}"):
        read(f"elsewhere/{one}")  # a path is a path

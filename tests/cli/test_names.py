"""Folders, recipes, runs and databases of odd names, and through links: every command takes a name
for what it is, never for a pattern, a URI or code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import made_runs
from tests.ranks import store
from tram_ds.cli import main as tram
from tram_ds.comparison.folders import run_folders
from tram_ds.jobs import sweep
from tram_ds.recipe.loading import load
from tram_ds.tracking.address import address
from tram_ds.tracking.server import get_run, new_client, prepare_environment
from tram_ds.tracking.state import Identity, begin

NAMES = ("a b", "run[1]", "it's q\"q", "ünï😀", "100%", "a%20b", "a?b#c", "-dash", "~x", "a\\b")
NAMES += ("$(x);b&c", "a*b")
LINKED = ("a b", "run[1]", "a%20b?c")  # through a link of this name to a folder of this name
RECIPE = """
name: odd
task: {name: language_modeling, data: generated}
model: {init: {architecture: gpt2, n_layer: 1, n_embd: 16, n_head: 2}}
algorithm: base
optimizer: {lr: 1e-3}
train: {steps: 2, global_batch: 2, micro_batch: 1}
"""


@pytest.fixture(params=[*NAMES, *(f"link to {name}" for name in LINKED)])
def name(request, tmp_path, monkeypatch):
    """The name of the working folder, and of a recipe in it."""
    name = request.param.removeprefix("link to ")
    folder = tmp_path / name
    if name != request.param:
        (tmp_path / "real" / name).mkdir(parents=True)
        folder.symlink_to(tmp_path / "real" / name)
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    (folder / f"{name}.yaml").write_text(RECIPE, encoding="utf-8")
    return name


def quoted(text: object) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def test_a_recipe_a_sweep_and_a_submission(name, capsys):
    assert tram.main(["train", "--dry-run", f"--recipe={name}.yaml"]) == 0
    Path("sweep.yaml").write_text(
        f"base: {quoted(name + '.yaml')}\ngrid: {{optimizer.lr: [0.5]}}\n", encoding="utf-8"
    )
    run_dir = f"run_dir={quoted('runs/' + name)}"
    assert tram.main(["sweep", "--dry-run", "--sweep=sweep.yaml", run_dir]) == 0
    assert f"to do     runs/{name}-lr=0.5  " in capsys.readouterr().out
    words = [f"--recipe={name}.yaml", "--slurm=a100_one_node", "slurm.gpus_per_node=2", run_dir]
    assert tram.main(["submit", "--dry-run", *words]) == 0
    assert f"/runs/{name}/slurm-" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == sorted([f"{name}.yaml", "sweep.yaml"])


def test_a_cell_finds_its_own_folder(name):
    """Through the words of its command line, which the run reads again."""
    grid = {"train.seed": [3], "task.data": [name]}
    (cell,) = sweep.cells(sweep.Sweep(base=[f"{name}.yaml"], grid=grid))
    again = load(cell.base, cell.overrides)
    assert again.resolved_run_dir() == cell.run_dir and again.task.data == name


def test_compare_takes_a_folder_by_its_name(name, capsys):
    here = Path.cwd()
    made = made_runs.write(here, made_runs.recipe("sam", 0), {"Art": 20.0, "cs_l1": 30.0})
    run = made.rename(here / f"run {name}")
    for decoy in ("run run1", "run aXb", "run aXb#c"):
        if set(name) & set("[*?"):
            (here / decoy).mkdir()
            (here / decoy / "recipe.yaml").write_text("{}")
    assert tram.main(["compare", str(run), f"--report=report of {name}"]) == 0
    said = capsys.readouterr()
    assert "30.0" in said.out and "left out" not in said.err
    assert (here / f"report of {name}" / "report.html").is_file()


def test_tracking_stays_in_the_folder_that_was_named(name, tmp_path, capsys):
    """Database and artifacts beside each other, nothing beside the folder, found by compare."""
    here = Path.cwd()
    store(here)
    run = made_runs.write(here, made_runs.recipe("sam", 0), {"Art": 20.0, "cs_l1": 30.0})
    (run / "tracking.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    results = json.loads((run / "results.json").read_text())
    uri = address(None, None, "", {}).uri
    text = (run / "recipe.yaml").read_text()
    begin(run, Identity(uri, name, name, name, {}, {}, text)).update(results=results)
    assert tram.main(["sync", str(run)]) == 0
    prepare_environment()
    found = get_run(new_client(uri), (run / "run_id").read_text().strip())
    assert found is not None and found.info.run_name == name
    kept = here.resolve() / "mlartifacts" / found.info.run_id / "artifacts"
    assert (kept / "recipe.yaml").read_text() == text
    made = set(tmp_path.rglob("*")) - set(before)
    assert all(path.is_relative_to(here.resolve()) for path in made if not path.is_symlink())
    capsys.readouterr()
    assert tram.main(["compare", f"--experiment={name}"]) == 0
    assert "30.0" in capsys.readouterr().out


def test_a_run_with_two_names_is_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = made_runs.write(tmp_path / "runs", made_runs.recipe("sam", 0), {"Art": 20.0, "cs": 30.0})
    (tmp_path / "runs" / "a-latest").symlink_to(run)
    assert run_folders(["runs/*"]) == [Path("runs") / run.name]
    assert run_folders(["runs/a-latest"]) == [Path("runs/a-latest")]

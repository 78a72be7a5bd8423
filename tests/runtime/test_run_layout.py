"""The names of a run folder's files stand in one place, and mean one thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from tram_ds.checkpoint.changes import another, finished
from tram_ds.runtime import run_layout
from tram_ds.runtime.run_layout import RunFolder, made, partial, superseded

ROOT = Path(__file__).resolve().parents[2]
PLACE = "tram_ds/runtime/run_layout.py"
FILES = {
    name: value
    for name in vars(RunFolder)
    if isinstance(value := getattr(RunFolder, name), str) and not name.startswith("_")
}
# short words that are other things too: a lock is looked for as a path, not as a word
WORDS = {
    RunFolder.export,
    RunFolder.best,
    RunFolder.analysis,
    RunFolder.lock,
    RunFolder.run_id,
    run_layout.LATEST,
}
ELSEWHERE = {  # file, word: what it is there
    ("tram_ds/data/installed_docs.py", run_layout.MANIFEST): "of a folder of the data cache",
}


def literals(code: str) -> set[str]:
    """Names of a run's files that stand in the code as text, docstrings and messages left out."""
    names = {*FILES.values(), run_layout.MANIFEST, run_layout.LATEST}
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = set(node.value.split("/"))
            if " " not in node.value:
                found |= parts & (names - WORDS)
        # the words count where a path is made of them
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            texts = [node.left, node.right]
            found |= {
                text.value
                for text in texts
                if isinstance(text, ast.Constant) and text.value in names
            }
    return found


def test_no_other_file_knows_the_names() -> None:
    found = set()
    for part in ("tram_ds", "launch"):
        for path in sorted((ROOT / part).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name != PLACE:
                found |= {(name, literal) for literal in literals(path.read_text())}
    assert found <= set(ELSEWHERE), "ask RunFolder"
    assert literals((ROOT / PLACE).read_text()) >= set(FILES.values()) - WORDS


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('run / "results.json"', {"results.json"}),
        ('open(f"{run}/metrics.jsonl")', {"metrics.jsonl"}),
        ('(run / "DONE").exists()', {"DONE"}),
        ('run / "export"', {"export"}),
        ('where / "latest"', {"latest"}),
        ('MARKERS = ("DONE", "REQUEUE")', {"DONE", "REQUEUE"}),
        ('tags = {"export": x}', set()),
        ('print("results.json was not written")', set()),
    ],
)
def test_the_search_finds_them(code: str, found: set[str]) -> None:
    assert literals(code) == found


def test_a_name_and_its_path() -> None:
    folder = RunFolder("runs/one")
    assert len(set(FILES.values())) == len(FILES) >= 18
    for name, value in FILES.items():
        assert getattr(folder, name) == Path("runs/one") / value
    assert superseded(folder.metrics) == Path("runs/one/metrics.superseded.jsonl")
    assert partial(folder.best) == Path("runs/one/best.partial")
    folders = {RunFolder.checkpoints, RunFolder.export, RunFolder.best, RunFolder.analysis}
    assert all(made(value) for value in set(FILES.values()) - folders)
    assert not any(made(value) for value in folders), "a file of that name is somebody's"


RECIPE = {
    "train": {"steps": 4},
    "optimizer": {"lr": 1e-3},
    "eval": {"splits": ["test"], "select": "final", "initial": False, "batch": None},
}


@pytest.mark.parametrize(
    ("marked", "change", "is_finished", "differs"),
    [
        (True, {}, True, []),
        (False, {}, False, []),
        (True, {"train": {"steps": 5}}, False, ["train.steps: 4 -> 5"]),
        (True, {"optimizer": {"lr": 1.0}}, False, ["optimizer.lr: 0.001 -> 1.0"]),
        (
            True,
            {"eval": {**RECIPE["eval"], "splits": ["validation"]}},
            False,
            ["eval.splits: ['test'] -> ['validation']"],
        ),
        (True, {"eval": {**RECIPE["eval"], "batch": 2}}, True, []),
        (False, {"optimizer": {"lr": 1.0}}, False, []),
    ],
)
def test_finished_means_this_recipe_these_steps_this_way(
    tmp_path: Path, marked: bool, change: dict, is_finished: bool, differs: list[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.recipe.write_text(yaml.safe_dump(RECIPE))
    if marked:
        folder.done.touch()
    assert folder.ended == marked
    assert finished(tmp_path, RECIPE | change) == is_finished
    assert another(tmp_path, RECIPE | change) == differs


def test_without_its_recipe_nobody_knows_what_was_finished(tmp_path: Path) -> None:
    RunFolder(tmp_path).done.touch()
    assert not finished(tmp_path, RECIPE) and another(tmp_path, RECIPE)

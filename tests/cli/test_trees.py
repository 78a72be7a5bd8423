"""What each command leaves in the folder it is started from: the tree before and after, by content.
Nothing that was there changes or goes, and what is new lies where the command says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_run_folder import tree
from tests.ranks import store
from tram_ds.cli import main as tram

RECIPE = """
name: own
task: {name: language_modeling, data: generated, max_eval_tokens: 200, cache_dir: CACHE}
model: {init: {architecture: gpt2, n_layer: 1, n_embd: 16, n_head: 2}}
algorithm: {name: asam, rho: 0.1}
optimizer: {lr: 1e-3}
train: {steps: 2, global_batch: 2, micro_batch: 1}
checkpoint: {every_steps: 1}
run_dir: runs/done
"""
NONE = r"$^"
TRACKED = r"mlflow\.db.*|mlartifacts(/.*)?|\.mlflow\.db\.lock"
NEW = rf"runs/new(/.*)?|{TRACKED}"
ONCE_MORE = rf"runs/done(/.*)?|{TRACKED}"
LOCK = r"runs/done/\.lock"
AGAIN = rf"runs/done/.*|{TRACKED}"  # all of it may be there already

# words -> (exit code, what may be new or change)
CASES: dict[str, tuple[int, str]] = {
    "train --recipe own.yaml --dry-run": (0, NONE),
    "train --recipe own.yaml --dry-run --overwrite run_dir=.": (0, NONE),
    "train --recipe own.yaml run_dir=runs/new": (0, NEW),
    "train --recipe own.yaml run_dir=runs/new tracking.enabled=false": (0, r"runs/new(/.*)?"),
    "train --recipe own.yaml run_dir=runs/new --resume": (0, NEW),
    "train --recipe own.yaml": (2, NONE),
    "train --recipe own.yaml --resume": (0, LOCK),
    "train --recipe own.yaml --overwrite": (0, ONCE_MORE),
    "train --recipe own.yaml --overwrite --resume": (2, NONE),
    "train --recipe own.yaml run_dir=.": (2, NONE),
    "train --recipe own.yaml run_dir=. --overwrite": (2, NONE),
    "train --recipe own.yaml run_dir=runs --overwrite": (2, NONE),
    "train --recipe own.yaml run_dir=runs/mine --overwrite": (2, NONE),
    "train --recipe own.yaml run_dir=link --overwrite": (2, NONE),
    "train --recipe own.yaml run_dir=notes.txt --overwrite": (2, NONE),
    "train --recipe own.yaml optimizer.lr=2e-3": (2, NONE),
    "train --recipe own.yaml --resume optimizer.lr=2e-3": (4, LOCK),
    "evaluate --recipe own.yaml --model runs/done": (0, NONE),
    "evaluate --recipe own.yaml --model runs/done --interpolate 0,1": (0, NONE),
    "evaluate --recipe own.yaml --model runs/done --out scores.json": (
        0,
        r"scores\.(json|rows\.npz)",
    ),
    "evaluate --recipe own.yaml --model runs/nowhere": (2, NONE),
    "compare runs/done": (0, NONE),
    "compare runs/*": (0, NONE),
    "compare runs/done --format markdown": (0, NONE),
    "compare runs/done --report out": (0, r"out(/.*)?"),
    "compare runs/done --report notes.txt": (2, NONE),
    "analyze --recipe own.yaml --what effect": (0, NONE),
    "sweep --sweep sweep.yaml --dry-run run_dir=runs/cell": (0, NONE),
    "sweep --sweep sweep.yaml run_dir=runs/cell": (0, rf"runs/cell-[^/]*(/.*)?|{TRACKED}"),
    "plan --recipe own.yaml --gpus 2": (0, NONE),
    "doctor --recipe own.yaml --no-smoke": (0, NONE),
    "doctor --recipe own.yaml": (0, NONE),
    "doctor --recipe own.yaml --no-smoke run_dir=runs/mine": (2, NONE),
    "benchmark --engines zero2 --rows nope": (2, NONE),
    "benchmark --engines zero2 --rows base --size small --tokens 8 --rounds 1 --json out": (
        0,
        "out",
    ),
    "quickstart algorithm=nope": (2, NONE),
    "quickstart run_dir=runs/mine": (2, NONE),
    "quickstart --overwrite run_dir=runs": (2, NONE),
    "submit --recipe own.yaml --slurm cpu_test --dry-run run_dir=runs/new": (0, NONE),
    "submit --recipe own.yaml --slurm cpu_test --seeds 0-3 --dry-run run_dir=runs/seed-{seed}": (
        0,
        NONE,
    ),
    "sync runs/done": (0, AGAIN),
    "sync runs/mine": (2, NONE),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's folder: files of their own, also where runs lie, and one finished run."""
    place = tmp_path_factory.mktemp("tree") / "work"
    (place / "runs" / "mine").mkdir(parents=True)
    (place / "data").mkdir()
    for name in ("notes.txt", "runs/mine/keep.txt", "data/rows.csv", "runs/notes.txt"):
        (place / name).write_text(f"precious {name}")
    (place / "link").symlink_to("data")
    (place / "own.yaml").write_text(RECIPE.replace("CACHE", str(place.parent / "cache")))
    (place / "sweep.yaml").write_text("base: own.yaml\ngrid: {algorithm.rho: [0.2]}\n")
    store(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert tram.main(["train", "--recipe", "own.yaml"]) == 0
    return place


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    place = tmp_path / "work"
    shutil.copytree(prepared, place, symlinks=True)
    monkeypatch.chdir(place)
    yield place


@pytest.mark.parametrize("words", CASES)
def test_a_command_leaves_what_it_says_and_what_was_there(words: str, here: Path) -> None:
    code, allowed = CASES[words]
    before, beside = tree(here), set(here.parent.iterdir())
    assert tram.main(words.split()) == code
    after = tree(here)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert not [name for name in changed if not re.fullmatch(allowed, name)]
    assert set(here.parent.iterdir()) == beside
    assert changed or allowed in (NONE, LOCK, AGAIN), "nothing was done"


@pytest.mark.parametrize("name", tram.COMMANDS)
def test_help_leaves_nothing(name: str, here: Path) -> None:
    before = tree(here)
    with pytest.raises(SystemExit) as ended:
        tram.main([name, "--help"])
    assert ended.value.code == 0 and tree(here) == before

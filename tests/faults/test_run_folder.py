"""Nothing that a run did not make is ever removed: folder trees before and after, for every kind of
folder and every flag."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import ROOT, script
from tram_ds.runtime import run_folder

pytestmark = pytest.mark.faults

FLAGS = {
    "none": {"resume": False, "overwrite": False},
    "--resume": {"resume": True, "overwrite": False},
    "--overwrite": {"resume": False, "overwrite": True},
}
RECIPE = """
task: {name: language_modeling, data: generated, seq_len: 16, max_eval_tokens: 200}
model: {init: {architecture: gpt2, n_layer: 1, n_embd: 16, n_head: 2}}
algorithm: sam
optimizer: {name: sgd, lr: 1e-3}
train: {steps: 2, global_batch: 2, micro_batch: 2}
engine: replicated
tracking: {enabled: false}
run_dir: run
"""


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> content digest, link target or "folder"."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = (
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            )
    return found


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def run_in(folder: Path) -> Path:
    """All that a run leaves, in the shapes of its names."""
    return write(
        folder,
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints/latest",
        "checkpoints/step-00000002/manifest.json",
        "checkpoints/step-00000002/shard-00001-model-00001-of-00001.safetensors",
        "checkpoints/step-00000001.old/manifest.json",
        "checkpoints/step-00000003.tmp-77-ab/shard-00001-model-00001-of-00001.safetensors",
        "export/config.json",
        "export/model.safetensors",
        "export/tokenizer.json",
        "best/model-00001-of-00002.safetensors",
        "run_id",
        "tracking.json",
        "results.json",
        "DONE",
        ".tracking.lock",
        "analysis.json",
        "analysis/cka.json",
        "lock.mutex",
        ".recipe.yaml.7.8.tmp",
    )


def linked(folder: Path, name: str, target: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)
    return folder


FOREIGN: dict[str, Callable[[Path], Path]] = {
    "notes only": lambda p: write(p / "mine", "notes.txt"),
    "a repository": lambda p: write(p / "mine", ".git/HEAD", "src/main.py", "recipe.yaml"),
    "a folder of runs": lambda p: run_in(p / "runs" / "a-sam-0").parent,
    "notes beside a run": lambda p: write(run_in(p / "run"), "notes.txt"),
    "notes in the export": lambda p: write(run_in(p / "run"), "export/notes.txt"),
    "another model in the export": lambda p: write(
        run_in(p / "run"), "export/adapter_model.safetensors"
    ),
    "a card that no run wrote": lambda p: write(run_in(p / "run"), "export/README.md"),
    "a folder in the checkpoints": lambda p: write(
        run_in(p / "run"), "checkpoints/mine/model.safetensors"
    ),
    "a file in a checkpoint": lambda p: write(
        run_in(p / "run"), "checkpoints/step-00000002/readme.md"
    ),
    "an empty folder": lambda p: (run_in(p / "run") / "plots").mkdir() or p / "run",
    "a hidden file": lambda p: write(p / "run", ".env"),
    "a name that is nearly ours": lambda p: write(p / "run", "metrics.jsonl.bak"),
    "checkpoints through a link": lambda p: linked(
        p / "run", "checkpoints", write(p / "disk", "step-00000001/manifest.json")
    ),
    "a file that is a link": lambda p: linked(
        p / "run", "recipe.yaml", write(p, "my.yaml") / "my.yaml"
    ),
    "a folder called as a file of ours": lambda p: (
        write(p / "run", "metrics.jsonl/data.csv").parent / "run"
    ),
    "a file": lambda p: write(p, "run") / "run",
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_with_anything_else_in_it_is_refused_whatever_the_flags(
    tmp_path: Path, kind: str, flags: str
) -> None:
    folder = FOREIGN[kind](tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="run_dir"):
        run_folder.refuse(folder, **FLAGS[flags])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("place", (".", "..", "/", "~", "{here}", "sub/.."))
def test_no_run_lives_where_one_stands_or_at_home(
    tmp_path: Path, monkeypatch, place: str, flags: str
) -> None:
    home = tmp_path / "home" / "me"
    (home / "work" / "sub").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    with pytest.raises(
        ValueError, match=r"run_dir .*(the folder you are in|a home folder).*such as run_dir="
    ):
        run_folder.refuse(Path(place.format(here=Path.cwd())).expanduser(), **FLAGS[flags])


def test_a_link_to_a_run_is_not_followed_by_overwrite(tmp_path: Path) -> None:
    run_in(tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    before = tree(tmp_path)
    with pytest.raises(
        ValueError, match=r"symbolic link, which --overwrite does not follow: name .*disk itself"
    ):
        run_folder.refuse(tmp_path / "run", resume=False, overwrite=True)
    run_folder.refuse(tmp_path / "run", resume=True, overwrite=False)
    assert tree(tmp_path) == before


def test_only_what_a_run_made_is_removed_and_its_locks_stay(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    write(folder, "lock", "lock.0123456789abcdef")
    job = write(folder / "slurm-20260131T101500-4242", "job.sbatch", "code/tram_ds/x.py")
    submitted = tree(job)
    run_folder.refuse(folder, resume=False, overwrite=True)
    run_folder.empty(folder)
    assert tree(job) == submitted, "the job may be running from it"
    left = [name for name in sorted(tree(folder)) if not name.startswith(job.name)]
    assert left == ["lock", "lock.0123456789abcdef", "lock.mutex"]


def test_a_submission_alone_is_no_run_and_no_stranger(tmp_path: Path) -> None:
    write(tmp_path / "run" / "slurm-20260131T101500-4242", "cells.json", "job.log")
    run_folder.refuse(tmp_path / "run", resume=False, overwrite=False)
    with pytest.raises(ValueError, match=r"slurm-notes\.txt"):
        run_folder.refuse(write(tmp_path / "run", "slurm-notes.txt"), resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("files", "sign"),
    [
        (("metrics.jsonl",), "not saved yet: metrics.jsonl"),
        (("recipe.yaml", "tracking.json"), "not saved yet: recipe.yaml, tracking.json"),
        (("recipe.yaml", "checkpoints/step-00000004/manifest.json"), "saved up to step-00000004"),
        (("recipe.yaml", "DONE"), "finished"),
    ],
)
def test_a_run_is_continued_or_refused_with_both_ways_out(
    tmp_path: Path, files: tuple[str, ...], sign: str
) -> None:
    folder = write(tmp_path / "run", *files)
    with pytest.raises(ValueError) as caught:
        run_folder.refuse(folder, resume=False, overwrite=False)
    message = str(caught.value)
    assert sign in message and message.index("--resume") < message.index("--overwrite")
    run_folder.refuse(folder, resume=True, overwrite=False)


def test_what_another_job_replaces_meanwhile_is_no_stranger(tmp_path: Path, monkeypatch) -> None:
    """Listed, and gone when it is looked at: a save's temporary file, an old checkpoint."""
    folder, listed = run_in(tmp_path / "run"), run_folder._listed
    gone = [folder / "metrics.gone", folder / "checkpoints" / "step-00000009"]
    monkeypatch.setattr(
        run_folder, "_listed", lambda f: listed(f) + [g for g in gone if g.parent == f]
    )
    run_folder.refuse(folder, resume=True, overwrite=False)
    assert listed(gone[1]) == []


def test_locks_alone_are_no_run(tmp_path: Path) -> None:
    run_folder.refuse(write(tmp_path / "run", "lock.mutex"), resume=False, overwrite=False)


def test_a_new_export_takes_the_place_of_the_old_one_but_not_of_what_somebody_put_there(
    tmp_path: Path, capsys
) -> None:
    for _ in range(2):
        write(tmp_path, "export.partial/config.json")
        run_folder.replace_export(
            tmp_path / "export.partial", write(tmp_path, "export/config.json") / "export"
        )
        assert sorted(tree(tmp_path)) == ["export", "export/config.json"]
    write(tmp_path, "export/notes.txt", "export.partial/config.json")
    run_folder.replace_export(tmp_path / "export.partial", tmp_path / "export")
    assert (tmp_path / "export.kept-1" / "notes.txt").read_text() == "export/notes.txt"
    assert sorted(tree(tmp_path / "export")) == ["config.json"]
    assert "export.kept-1" in capsys.readouterr().out
    write(tmp_path, "best.old/config.json")  # killed between the two renames: the old one is back
    run_folder.restore_export(tmp_path / "best")
    assert sorted(tree(tmp_path / "best")) == ["config.json"]
    assert not (tmp_path / "best.old").exists()


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "tiny.yaml").write_text(RECIPE)
    program = ROOT / "launch" / "train.py"
    return script(program, "--recipe", "tiny.yaml", *arguments, cwd=folder, timeout=120)


def steps_of(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def test_train_as_a_user_starts_it(tmp_path: Path) -> None:
    """Refused with exit 2 and the tree as it was; a run is finished, left alone, resumed, refused
    for a change, overwritten."""
    write(tmp_path, "data/mine.csv")
    train(tmp_path, "--dry-run")
    before = tree(tmp_path)
    for arguments in (
        ("run_dir=.", "--overwrite"),
        ("run_dir=data",),
        ("run_dir=data", "--resume"),
    ):
        done = train(tmp_path, *arguments)
        assert done.returncode == 2 and done.stderr.count("error:") == 1, (
            arguments,
            done.stderr[-800:],
        )
    assert tree(tmp_path) == before
    assert train(tmp_path).returncode == 0
    assert not run_folder.strangers(tmp_path / "run"), "the written list is the whole list"
    made = tree(tmp_path)
    for arguments, code, word in (
        ((), 2, "--resume"),
        (("--resume", "--overwrite"), 2, "one of the two"),
        (("--resume",), 0, ""),
        (("--resume", "train.steps=4"), 4, "train.steps: 2 -> 4"),
    ):
        done = train(tmp_path, *arguments)
        assert done.returncode == code and word in done.stderr, (arguments, done.stderr[-800:])
        assert tree(tmp_path) == made
    done = train(tmp_path, "--resume", "train.steps=4", "--allow-change")
    assert done.returncode == 0 and steps_of(tmp_path / "run") == [1, 2, 3, 4], done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["selected"] == {"step": 4}
    done = train(tmp_path, "--resume", "train.steps=3", "--allow-change")
    assert done.returncode == 4 and "beyond the 3 steps asked for" in done.stderr
    done = train(tmp_path, "--overwrite", "train.steps=1")
    assert (
        done.returncode == 0
        and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    )
    assert (tmp_path / "data" / "mine.csv").read_text() == "data/mine.csv"


def test_a_run_that_died_before_its_first_checkpoint_keeps_its_record(tmp_path: Path) -> None:
    write(tmp_path / "run", "recipe.yaml")
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n'
    )
    assert train(tmp_path).returncode == 2
    done = train(tmp_path, "--resume")
    assert done.returncode == 0 and "no checkpoint: starting at step 0" in done.stdout
    assert (tmp_path / "run" / "metrics.superseded.jsonl").read_text().count('"loss"') == 2


def test_an_unfinished_run_of_another_recipe_names_the_flag(tmp_path: Path) -> None:
    assert train(tmp_path, "train.stop_after=1").returncode == 75
    done = train(tmp_path, "--resume", "optimizer.lr=0.123")
    assert done.returncode == 4
    assert "undo the change, or allow it with --allow-change: optimizer.lr: " in done.stderr
    assert train(tmp_path, "--resume", "optimizer.lr=0.123", "--allow-change").returncode == 0

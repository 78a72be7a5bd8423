"""`tram`, `python -m tram_ds` and launch/*.py are one command line: its help, its imports, its
errors."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, environment
from tram_ds.cli import main as tram

HEAVY = {"torch", "pandas", "mlflow", "transformers", "deepspeed", "matplotlib", "datasets"}
MODULE = [sys.executable, "-m", "tram_ds"]


def ran(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )


def imported(stderr: str) -> set[str]:
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[-1].strip() for line in lines}


def test_every_command_has_its_script_and_every_script_its_command() -> None:
    modules = {p.stem for p in (ROOT / "tram_ds" / "cli").glob("*.py")}
    assert modules - {"__init__", "completion", "main", "shared"} == set(tram.COMMANDS)
    assert {p.stem for p in (ROOT / "launch").glob("*.py")} == set(tram.COMMANDS)
    for name in tram.COMMANDS:
        text = (ROOT / "launch" / f"{name}.py").read_text()
        assert f'script("{name}")' in text and len(text.splitlines()) < 15
        assert f"launch/{name}.py --help" in (ast.get_docstring(ast.parse(text)) or "")


@pytest.mark.parametrize("name", tram.COMMANDS)
def test_help_answers_imports_nothing_heavy_and_changes_nothing(tmp_path: Path, name: str) -> None:
    """Asked of the imports, not of a clock: torch, pandas and mlflow are what takes seconds."""
    script = str(ROOT / "launch" / f"{name}.py")
    done = ran([sys.executable, "-X", "importtime", script, "--help"], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}.py")
    assert not imported(done.stderr) & {*HEAVY, "pydantic", "yaml", "rich"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["train", "--recipe", "m2d2_gpt2xl.yaml", "--dry-run"]],
    ids=" ".join,
)
def test_tram_answers_without_what_takes_seconds(tmp_path: Path, words: list[str]) -> None:
    done = ran([sys.executable, "-X", "importtime", "-m", "tram_ds", *words], tmp_path)
    assert done.returncode == 0 and done.stdout
    assert not imported(done.stderr) & HEAVY


@pytest.mark.parametrize("name", tram.COMMANDS)
@pytest.mark.parametrize("checkout", [False, True])
def test_help_prints_each_command_on_a_line_of_its_own(name: str, checkout: bool) -> None:
    """One that is too long goes on after a backslash, so that it can be copied."""
    text = tram.parsers(checkout)[1][name].description or ""
    spelled = rf"launch/{name}\.py" if checkout else rf"(-m tram_ds|--module tram_ds|tram) {name}\b"
    lines = [line.strip() for line in text.splitlines() if re.search(spelled, line)]
    assert lines
    for line in lines:
        assert line.startswith(("tram ", "python ", "torchrun ", "deepspeed ", "srun ")), line
        assert len(re.findall(spelled, line)) == 1, line
    whole = text.replace("\\\n", " ").splitlines()
    assert not [line for line in whole if line.strip().startswith(("--", "section."))]
    other = rf"\btram {name}\b|tram_ds {name}\b" if checkout else r"launch/"
    assert not re.search(other, text), "one spelling"


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tram.main([]) == 0
    without = capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        tram.main(["--help"])
    assert ended.value.code == 0 and capsys.readouterr().out == without
    for name in tram.COMMANDS:
        assert re.search(rf"^    {name}\s+\w", without, re.MULTILINE), name


def test_an_unknown_command_is_exit_2_and_names_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        tram.main(["trian", "--recipe", "x"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "'trian'" in said and all(name in said for name in tram.COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        ["--local_rank=0", "train", "--recipe", "quickstart", "--dry-run"],
        ["train", "--local_rank=0", "algorithm=sam", "--recipe", "quickstart", "--dry-run"],
        ["train", "--recipe", "quickstart", "--dry-run", "algorithm=sam", "train.seed=3"],
    ],
    ids=" ".join,
)
def test_launchers_put_their_rank_first_and_overrides_stand_anywhere(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tram.main(words) == 0
    chosen = "sam" if "algorithm=sam" in words else "tram_prev"
    assert f"name: {chosen}" in capsys.readouterr().out


def test_what_goes_wrong_is_one_line_said_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert tram.main(["train", "--recipe", "quickstart", "algorithm=samm"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == count and all("did you mean 'sam'?" in line for line in said)


def test_what_nobody_foresaw_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> int:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(importlib.import_module("tram_ds.cli.plan"), "run", broken)
    assert tram.main(["plan", "--recipe", "quickstart", "--gpus", "1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "a fault of ours" in said


def test_quickstart_takes_nothing_for_a_recipe_key_that_is_none(tmp_path: Path) -> None:
    done = ran([sys.executable, str(ROOT / "launch" / "quickstart.py"), "sam"], tmp_path)
    assert done.returncode == 2 and "section.key=value" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_module_starts_as_the_script_does(tmp_path: Path) -> None:
    words = ["--recipe", "xnli_xlmr", "--dry-run"]
    script = ran([sys.executable, str(ROOT / "launch" / "train.py"), *words], tmp_path)
    module = ran([*MODULE, "train", *words], tmp_path)
    assert module.returncode == script.returncode == 0
    assert module.stdout == script.stdout != ""


def test_a_checkout_reads_help_in_its_own_words() -> None:
    text = (
        "tram train x\ntorchrun --nproc_per_node 8 -m tram_ds train x\n"
        "deepspeed --num_gpus 2 --module tram_ds evaluate x\nsrun tram doctor x\n`tram trial`"
    )
    assert tram.in_checkout(text).splitlines() == [
        "python launch/train.py x",
        "torchrun --nproc_per_node 8 launch/train.py x",
        "deepspeed --num_gpus 2 launch/evaluate.py x",
        "srun python launch/doctor.py x",
        "`tram trial`",
    ]

"""Every command that README, docs, recipes, configs and help print is run as printed, in this
process. What needs a GPU, SLURM, weights, runs or a network has the stand-in that STAND_IN says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tram_ds.cli import main as tram
from tram_ds.cli.shared import slurm_keys
from tram_ds.jobs import cells, slurm, slurm_config
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe, accumulation

STAND_IN = {
    "train": "with --dry-run, and its global batch shared by the ranks that the launcher starts",
    "evaluate": "its command line and recipe, without model and data",
    "analyze": "its command line and recipe, without model and data",
    "sweep": "with --dry-run",
    "submit": "with --dry-run",
    "doctor": "its command line, recipe and job, without looking at the machine",
    "quickstart": "its command line and recipe",
    "compare": "as printed with --paper; else its command line",
    "benchmark": "its command line",
    "sync": "its command line",
    "export": "its command line",
    "plan": "as printed, without --trace",
    "verify_gpu": "its command line",
}
RANKS = re.compile(r"--(?:num_gpus|num_accelerators|nproc[-_]per[-_]node|ntasks)[= ](\d+)")
STARTS = r"(?:\.venv/bin/)?python (?:-m tram_ds|launch/)|deepspeed |torchrun |srun |tram [a-z]"
SHOWN = re.compile(rf"^[\s#]*((?:{STARTS}).*)$", re.MULTILINE)


def sources() -> dict[str, str]:
    found = {
        str(path.relative_to(ROOT)): path.read_text()
        for pattern in ("README.md", "docs/*.md", "recipes/README.md", "configs/slurm/*.yaml")
        for path in sorted(ROOT.glob(pattern))
    }
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        found[str(path.relative_to(ROOT))] = path.read_text().splitlines()[0]
    found["tram --help"] = tram.parsers()[0].description or ""
    for checkout in (False, True):
        for parser in tram.parsers(checkout)[1].values():
            found[f"{parser.prog} --help"] = parser.description or ""
    return found


def printed() -> list[tuple[str, str]]:
    """(where, command), each command once."""
    found: dict[str, str] = {}
    for where, text in sources().items():
        text = re.sub(r"\\\n\s*", "", text)
        for command in SHOWN.findall(text):
            command = re.split(r"`|\s\s+#|\s# ", command)[0].strip()
            if "..." not in command and "NAME-OR-PATH" not in command and "[" not in command[:40]:
                found.setdefault(command, where)
    return [(where, command) for command, where in found.items()]


def words_of(command: str) -> list[str]:
    """Of `tram`, whatever starts it."""
    words = shlex.split(command)
    for place, word in enumerate(words):
        if found := re.fullmatch(r"launch/([a-z_]+)\.py", word):
            return [found[1], *words[place + 1 :]]
        if word in ("tram", "tram_ds") and words[place + 1 :]:
            return words[place + 1 :]
    raise AssertionError(f"no command of ours in {command!r}")


def recipe_of(words: list[str]) -> Recipe:
    words = ["quickstart" if word == "RECIPE" else word for word in words]  # whichever
    options = tram.parsers()[1][words[0]].parse_intermixed_args(words[1:])
    own = [x for x in options.overrides if x.split(".")[0] not in ("slurm", "sharpness", "effect")]
    return load(getattr(options, "recipe", None) or "quickstart", own)


def test_there_are_many_and_each_command_has_its_stand_in() -> None:
    assert len(printed()) > 45
    assert {words_of(command)[0] for _, command in printed()} == set(tram.COMMANDS) == set(STAND_IN)


@pytest.mark.parametrize(("where", "command"), printed(), ids=lambda text: text.replace("/", "|"))
def test_a_printed_command_works(
    where: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_of(command)
    ranks = RANKS.search(command)
    if words[0] == "train":
        assert tram.main([*words, "--dry-run"]) == 0, where + capsys.readouterr().err
        accumulation(recipe_of(words), int(ranks[1]) if ranks else 1)
    elif words[0] in ("sweep", "submit"):
        assert tram.main([*words, *["--dry-run"] * ("--dry-run" not in words)]) == 0, (
            where + capsys.readouterr().err
        )
    elif words[0] == "doctor":
        recipe = recipe_of(words)
        options = tram.parsers()[1]["doctor"].parse_intermixed_args(words[1:])
        ours, theirs = slurm_keys(options.overrides)
        if options.slurm:
            config = slurm_config.load(options.slurm, ours)
            assert slurm.plan(cells.cells(options.recipe, theirs), config).cells
        else:
            accumulation(recipe, int(ranks[1]) if ranks else 1)
    elif words[0] == "plan" or "--paper" in words:
        code = tram.main([word for word in words if word != "--trace"])
        assert code in ((0, 1) if words[0] == "plan" else (0,)), where + capsys.readouterr().err
    elif words[0] in ("evaluate", "analyze", "quickstart"):
        assert recipe_of(words)
    else:
        assert tram.parsers()[1][words[0]].parse_intermixed_args(words[1:])


def test_a_command_that_does_not_work_is_noticed() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        accumulation(recipe_of(["train", "--recipe", "m2d2_gpt2xl"]), 16)
    with pytest.raises(ValueError, match="unknown key"):
        recipe_of(["evaluate", "--recipe", "m2d2_gpt2xl", "train.stpes=3"])


@pytest.mark.parametrize(
    "line", re.findall(r"(?:`|    )make ([a-z-]+)", (ROOT / "README.md").read_text())
)
def test_a_printed_target_is_one_of_the_makefile(line: str) -> None:
    assert re.search(rf"^{line}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readme_says_how_a_shell_gets_the_tools() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("source .venv/bin/activate") < text.index("deepspeed --num_gpus")

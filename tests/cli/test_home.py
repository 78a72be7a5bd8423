"""`~` in a path is the home wherever a shell leaves it, a variable is refused by name, and no
command makes a folder called `~`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests import made_runs
from tram_ds.cli import main as tram
from tram_ds.data.cache import cache_root
from tram_ds.jobs import slurm_config
from tram_ds.recipe.file import RECIPES
from tram_ds.recipe.loading import load
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.paths import expanded, expanded_uri
from tram_ds.tracking.address import address

PLACES = ("run_dir", "task.data", "task.tokenizer", "task.cache_dir", "model.path", "tracking.uri")
FREED = {"model.path": ["model.init=null"]}
DRY = ("train", "--recipe=quickstart", "--dry-run")
GIVEN = [
    *((*DRY, *FREED.get(key, []), f"{key}=VALUE") for key in PLACES),
    (*DRY, "engine.name=zero", "engine.config=VALUE.json"),
    ("train", "--recipe=VALUE"),
    ("sweep", "--sweep=VALUE"),
    ("submit", "--recipe=quickstart", "--slurm=VALUE"),
    ("submit", "--recipe=quickstart", "--slurm=cpu_test", "--dry-run", "slurm.python=VALUE"),
    ("evaluate", "--recipe=quickstart", "--model=VALUE"),
    ("evaluate", "--recipe=quickstart", "--out=VALUE"),
    ("analyze", "--recipe=quickstart", "--export=VALUE"),
    ("compare", "--report=VALUE"),
    ("compare", "--experiment=x", "--uri=VALUE"),
    ("sync", "VALUE"),
    ("sync", ".", "--uri=VALUE"),
    ("benchmark", "--json=VALUE"),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home beside the working folder; nothing called `~` is in either when the test ends."""
    (home := tmp_path / "home").mkdir()
    (here := tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


@pytest.mark.parametrize("words", GIVEN, ids=" ".join)
def test_a_variable_that_nothing_expanded_is_refused_by_name(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tram.main([word.replace("VALUE", "$SCRATCH/x") for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "$SCRATCH is not expanded here: write the path out" in lines[0]
    assert not list(Path().iterdir())


@pytest.mark.parametrize("key", PLACES)
def test_a_key_of_a_recipe_stands_for_the_home(key: str, home: Path) -> None:
    section, _, name = key.rpartition(".")
    value = "sqlite:///~/x" if key == "tracking.uri" else "~/x"
    recipe = load("quickstart", [*FREED.get(key, []), f"{key}={value}"])
    found = getattr(getattr(recipe, section) if section else recipe, name)
    assert found == value.replace("~", str(home))


def test_so_do_keys_that_one_task_reads(home: Path) -> None:
    task = TaskSection(name="instruction", data="~", chat_template="~/t.jinja")
    assert (task.data, task.chat_template) == (str(home), f"{home}/t.jinja")
    assert ModelSection(path="~/m").path == f"{home}/m"


def test_a_recipe_and_its_engines_config_in_the_home(home: Path) -> None:
    own = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    (home / "own.yaml").write_text(yaml.safe_dump(own))
    (home / "z.json").write_text('{"zero_optimization": {"stage": 1}}')
    recipe = load("~/own", ["engine.name=zero", "engine.config=~/z.json", "run_dir=~/{seed}"])
    assert recipe.engine.config == f"{home}/z.json"
    assert recipe.resolved_run_dir() == home / "0"


def test_a_report_and_the_runs_of_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_runs.write(home / "runs", made_runs.recipe("sam", 0), {"Art": 20.0, "cs_l1": 30.0})
    assert tram.main(["compare", "~/runs/*", "--report=~/out"]) == 0
    assert (home / "out" / "report.html").is_file() and not list(Path().iterdir())
    assert "30.0" in capsys.readouterr().out


def test_what_a_job_script_expands_is_the_home_of_the_job(home: Path) -> None:
    config = slurm_config.load(
        "cpu_test",
        [
            "python=~/venv/bin/python",
            "env={TRITON_CACHE_DIR: ~/triton, LD_LIBRARY_PATH: '/a:~/lib', A: a~b}",
            "container={runtime: apptainer, image: ~/a.sif, mounts: ['~/d:/d']}",
            "container.options=[--home=~/h]",
        ],
    )
    assert config.python == f"{home}/venv/bin/python" and config.container is not None
    assert config.env == {
        "TRITON_CACHE_DIR": "$HOME/triton",
        "LD_LIBRARY_PATH": "/a:$HOME/lib",
        "A": "a~b",
    }
    box = config.container
    assert (box.image, box.mounts) == ("$HOME/a.sif", ["$HOME/d:/d"])
    assert box.options == ["--home=$HOME/h"]


def test_the_cache_and_mlflow_by_their_variables(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAM_DS_CACHE", "~/cache")
    assert cache_root() == home / "cache"
    found = address(None, None, "x", {"MLFLOW_TRACKING_URI": "sqlite:///~/m.db"})
    assert found.uri == f"sqlite:///{home}/m.db"
    monkeypatch.setenv("TRAM_DS_CACHE", "$SCRATCH/cache")
    with pytest.raises(ValueError, match=r"TRAM_DS_CACHE \$SCRATCH/cache: \$SCRATCH is not"):
        cache_root()


@pytest.mark.parametrize(
    "name", ["a~b", "./~", "a/~/b", "cost$a", "$(x)", "~nobody-of-this-name/x"]
)
def test_other_names_are_names(name: str) -> None:
    assert expanded(name) == name


def test_a_folder_that_is_there_by_this_very_name_is_meant(tmp_path: Path) -> None:
    (tmp_path / "$SCRATCH").mkdir()
    assert expanded(str(tmp_path / "$SCRATCH")) == str(tmp_path / "$SCRATCH")


def test_a_tilde_of_a_server_is_the_servers(home: Path) -> None:
    assert expanded_uri("http://host/~user/mlflow") == "http://host/~user/mlflow"
    assert expanded_uri("file:~/mlruns") == f"file:{home}/mlruns"

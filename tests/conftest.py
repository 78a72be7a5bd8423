"""One thread per process for every test: two ranks on two cores, and tiny tensors that threads only
slow down. Of two workers of pytest-xdist each takes whole files, the long ones first; a test that
measures time has the machine to itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import zygote  # noqa: F401 - remembers the environment before any test has changed it
from tests.made_recipes import MINIMAL
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe, RecipeError

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Files that take half a minute or more, the longest first: begun last, one would keep a worker
# alone. Those with tests marked `alone`, for which the other worker waits, come after all of them.
LONG = (
    "integration/test_slurm.py",
    "integration/test_real_models.py",
    "parity/test_parity.py",
    "integration/test_terminal.py",
    "integration/test_quickstart.py",
    "cli/test_wheel.py",
    "faults/test_resume.py",
    "faults/test_campaign.py",
    "faults/test_stop.py",
    "parity/test_special.py",
    "integration/test_train.py",
    "bench/test_benchmark.py",
    "bench/test_host_memory.py",
    "integration/test_recipes.py",
    "cli/test_trees.py",
    "integration/test_mlflow_ui.py",
    "integrations/test_ranks.py",
    "bench/test_tokenise.py",
    "verification/test_kit.py",
    "planning/test_planning.py",
    "docs/test_commands.py",
    "integration/test_own_data.py",
    "models/test_compile.py",
    "integration/test_study.py",
    "integration/test_readme.py",
    "integration/test_tracking_status.py",
    "integration/test_mlflow_server.py",
)
# Files whose tests share nothing: each case may go to either worker.
APART = ("integration/test_recipes.py", "integration/test_readme.py")


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


def engine_of(nodeid: str) -> str:
    """The first parameter of a test of parity/test_parity.py."""
    return nodeid.partition("[")[2].rstrip("]").partition("-")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = file_of(item.nodeid)
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)  # stable


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument, not by what is in them: a packed file holds the second in
    which it was packed, and two workers have to collect the same names."""
    return argname if isinstance(val, bytes) else None


class Files(LoadScopeScheduling):
    """A file goes to one worker, because its tests share costly fixtures and caches; in parity,
    what one engine found. (The marks of --dist loadgroup do not reach pytest 9.2's node ids.)"""

    def _split_scope(self, nodeid: str) -> str:
        name = file_of(nodeid)
        if name == "parity/test_parity.py":
            return f"{name}:{engine_of(nodeid)}"
        return nodeid if name in APART else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    return Files(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """A test marked `alone` waits until the tests of other workers have ended, and they for it.
    After the last test of a file the process is as it was: fixtures of a file train in it, too."""
    with _turn(item.config, item.get_closest_marker("alone") is not None):
        found = yield
    if nextitem is None or nextitem.path != item.path:
        put_back(*FOUND)
    return found


@contextlib.contextmanager
def _turn(config: pytest.Config, alone: bool) -> Iterator[None]:
    """Shared, or alone. Who waits to be alone holds the gate, so that nobody new goes in."""
    if not hasattr(config, "workerinput"):
        yield
        return
    folder = config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    with (folder / "gate").open("w") as gate, (folder / "machine").open("w") as machine:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:  # not left to close(): a fork that lives on has the file open too
            fcntl.flock(machine, fcntl.LOCK_UN)


Found = tuple[dict[signal.Signals, Any], dict[str, str]]
STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def as_found() -> Found:
    """Handlers of stop signals, and the environment."""
    return {number: signal.getsignal(number) for number in STOPS}, dict(os.environ)


def put_back(handlers: dict[signal.Signals, Any], environment: dict[str, str]) -> None:
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    for name in {*os.environ, *environment} - {"PYTEST_CURRENT_TEST"}:
        if name not in environment:
            del os.environ[name]
        elif os.environ.get(name) != environment[name]:
            os.environ[name] = environment[name]


FOUND = as_found()


@pytest.fixture(autouse=True)
def process_as_found() -> Iterator[None]:
    """A test leaves its process as it found it. A run in this process leaves stop signals ignored,
    which every later child would inherit; MLflow and launchers write into the environment, by which
    ranks.script decides whether a fork will do."""
    found, tables = as_found(), tables_of_the_library()
    yield
    put_back(*found)
    changed = [one for one in tables if one[0] != one[2]]
    for table, _, entries in changed:
        table.clear()
        table.update(entries)
    assert not changed, f"{[one[1] for one in changed]}: changed, also for every later test"


def tables_of_the_library() -> list[tuple[dict[Any, Any], str, dict[Any, Any]]]:
    """Each module's table of constants, its name, and what stands in it."""
    return [
        (table, f"{name}.{constant}", dict(table))
        for name, module in list(sys.modules.items())
        if name.startswith("tram_ds.")
        for constant, table in vars(module).items()
        if constant.isupper() and type(table) is dict  # not a lazy mapping of another library
    ]


@pytest.fixture
def recipe_of(tmp_path, monkeypatch):
    """(text, *overrides) -> Recipe, from a file called mine.yaml in the working folder."""
    monkeypatch.chdir(tmp_path)

    def build(text: str = MINIMAL, *overrides: str) -> Recipe:
        Path("mine.yaml").write_text(text, encoding="utf-8")
        return load("mine.yaml", list(overrides))

    return build


@pytest.fixture
def refusal(recipe_of):
    """(text, *overrides) -> the lines of the RecipeError."""

    def build(text: str = MINIMAL, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            recipe_of(text, *overrides)
        return str(caught.value).split("\n")

    return build

"""A sweep is one or more recipes and a grid over their keys: a run per cell, one after the other.

Run folders are those of single runs, with the values of further keys at the end: a cell that was
run by hand or by launch/submit.py is found, and finished cells are skipped.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator

from tram_ds.checkpoint.changes import another, finished
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe import loading, recipe
from tram_ds.recipe.errors import explain
from tram_ds.recipe.file import RecipeError
from tram_ds.recipe.recipe import to_dict
from tram_ds.runtime import exits, run_folder, terminal
from tram_ds.runtime.checked import Section, refusal
from tram_ds.tracking.results import how_it_ended

FOLDER = recipe_file.RECIPES / "sweeps"
TRAIN = recipe_file.LAUNCH / "train.py"
# keys the default run_dir already tells apart
IN_RUN_DIR = ("algorithm", "algorithm.name", "train.seed")
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Names = Annotated[
    list[str], Field(min_length=1), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)
]


class Sweep(Section):
    """A sweep file."""

    base: Names
    """A recipe, or several: every cell is run with each."""
    grid: dict[str, list[Any]]
    """Recipe key, dotted -> its values. The last key varies fastest."""

    also: list[dict[str, list[Any]]] = Field(default_factory=list)
    """Further grids, each with keys of its own: their cells follow those of `grid`."""

    @field_validator("grid")
    @classmethod
    def _has_values(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if problems := _problems(grid):
            raise refusal(*problems)
        return grid

    @field_validator("also")
    @classmethod
    def _have_values(cls, also: list[dict[str, list[Any]]]) -> list[dict[str, list[Any]]]:
        problems = [
            (f"{number}.{key}", what)
            for number, grid in enumerate(also)
            for key, what in _problems(grid)
        ]
        if problems:
            raise refusal(*problems)
        return also

    def with_seeds(self, seeds: list[int]) -> Sweep:
        """The same with these seeds in every grid."""
        grids = [{**grid, "train.seed": seeds} for grid in (self.grid, *self.also)]
        return self.model_copy(update={"grid": grids[0], "also": grids[1:]})


def _problems(grid: dict[str, list[Any]]) -> list[tuple[str, str]]:
    """(key, what is wrong with it)."""
    problems = [
        (key, "needs at least one value, e.g. [sam, asam]")
        for key, values in grid.items()
        if not values
    ]
    twice = [k for k, values in grid.items() if len({json.dumps(v) for v in values}) < len(values)]
    problems += [(key, "has a value twice") for key in twice]
    problems += [
        (key, "cannot be swept: each cell gets its own")
        for key in grid
        if key in ("run_dir", "name")
    ]
    return problems


@dataclass(frozen=True)
class Cell:
    """One run. overrides: what is added to the recipe `base` on the command line; recipe: what it
    is then, resolved."""

    base: str
    overrides: tuple[str, ...]
    run_dir: Path
    recipe: recipe.Recipe
    smoke: bool = False

    @property
    def finished(self) -> bool:
        """Whether its folder holds a finished run of this very recipe."""
        return finished(self.run_dir, to_dict(self.recipe))

    @property
    def differences(self) -> list[str]:
        """What the finished run in its folder was made with, where that is another recipe."""
        return another(self.run_dir, to_dict(self.recipe))

    def command(self, launcher: Sequence[str]) -> list[str]:
        """The command that runs it, or goes on with it where it has begun."""
        flags = ["--smoke"] if self.smoke else []
        flags += ["--resume"] if run_folder.begun(self.run_dir) else []
        return [*launcher, str(TRAIN), "--recipe", self.base, *self.overrides, *flags]


def read(name: str) -> Sweep:
    """A sweep file; a bare name stands for recipes/sweeps/NAME.yaml. RecipeError, one line per
    problem."""
    path = recipe_file.find(name, FOLDER, "sweep file")
    source = recipe_file.read(path, path.name)
    try:
        return Sweep.model_validate(source.data)
    except ValidationError as error:
        raise explain(error, Sweep, source) from None


def cells(sweep: Sweep, overrides: Sequence[str] = (), smoke: bool = False) -> list[Cell]:
    """Every run, in the order of the file. All are checked: RecipeError names the cell that cannot
    be."""
    found: dict[Path, Cell] = {}
    grids = (sweep.grid, *sweep.also)
    chosen = [
        (base, dict(zip(grid, values, strict=True)))
        for grid in grids
        for base, *values in itertools.product(sweep.base, *grid.values())
    ]
    for base, values in chosen:
        keys = sorted(values, key=lambda key: key.count("."))  # a whole section before its keys
        words = [*overrides, *(f"{key}={_text(values[key])}" for key in keys)]
        cell = _cell(base, words, values, smoke)
        if cell.run_dir in found:
            raise RecipeError(
                f"two cells share the folder {cell.run_dir}: {_what(found[cell.run_dir])} and "
                f"{_what(cell)}"
            )
        found[cell.run_dir] = cell
    return list(found.values())


def run(found: Sequence[Cell], launcher: Sequence[str], continue_on_error: bool = False) -> int:
    """Runs the cells that are not finished; returns 0, or the exit code of the first that failed.

    A folder with a finished run of another recipe is the cell's failure (4): train.py names what
    differs. A cell that was stopped to be requeued (75) ends the sweep with 75: starting the sweep
    again goes on from there.
    """
    first_failure = exits.DONE
    for number, cell in enumerate(found, start=1):
        where = f"[{number}/{len(found)}] {cell.run_dir}"
        if cell.finished:
            print(f"{where}: finished before{how_it_ended(cell.run_dir)}", flush=True)
            continue
        print(f"{where}: runs", flush=True)
        code, stopped = _run(cell.command(launcher))
        if code != exits.DONE:
            print(f"{where}: exit {code}", flush=True)
        # stopped: told to end while a cell was just finishing, it must not begin the next
        if code == exits.REQUEUE or (stopped and number < len(found)):
            return exits.REQUEUE
        first_failure = first_failure or code
        if code != exits.DONE and not continue_on_error:
            break
    return first_failure


def _run(command: list[str]) -> tuple[int, bool]:
    """(exit code, whether this process was told to stop). Signals are passed on, so that the run
    saves and stops."""
    try:
        relay = terminal.Relay(command)
    except OSError as error:
        raise RecipeError(f"--launcher: cannot start {command[0]}: {error}") from None
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        if number != signal.SIGINT:  # the terminal sends that one to the run too
            relay.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPPING}
    try:
        code = relay.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), bool(received)


def _cell(base: str, overrides: list[str], chosen: dict[str, Any], smoke: bool) -> Cell:
    loaded = loading.load(base, overrides, smoke=smoke)
    suffix = "".join(
        f"-{k.rpartition('.')[2]}={json.dumps(v)}" for k, v in chosen.items() if k not in IN_RUN_DIR
    )
    if suffix:
        run_dir = loaded.run_dir + re.sub(r"[^A-Za-z0-9_.=+-]+", "_", suffix.replace('"', ""))
        overrides = [*overrides, f"run_dir={_text(run_dir)}"]
        loaded = loading.load(base, overrides, smoke=smoke)
    return Cell(base, tuple(overrides), loaded.resolved_run_dir(), loaded, smoke)


def _text(value: Any) -> str:
    """The value as YAML that the command line takes: JSON, but without its escapes, of which YAML
    makes two halves of a character such as an emoji."""
    return json.dumps(value, ensure_ascii=False)


def state(cell: Cell) -> str:
    """`finished`, `to do`, or how the finished run in its folder differs."""
    if there := cell.differences:
        return f"another run ({'; '.join(there)})"
    return f"finished{how_it_ended(cell.run_dir)}" if cell.finished else "to do"


def _what(cell: Cell) -> str:
    return " ".join([cell.base, *cell.overrides])

"""The runs of a submission: one, or one per seed and cell of a sweep file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tram_ds.checkpoint.changes import another, finished
from tram_ds.jobs import sweep
from tram_ds.jobs.sweep import Sweep
from tram_ds.recipe import loading, recipe
from tram_ds.recipe.file import RecipeError
from tram_ds.runtime.wording import short


@dataclass(frozen=True)
class Cell:
    """One run: its recipe, resolved, and its run folder, absolute."""

    recipe: recipe.Recipe
    run_dir: Path

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: this very recipe was run there to its end.

        RecipeError where a finished run of another recipe is in the folder.
        """
        now = recipe.to_dict(self.recipe)
        if there := another(self.run_dir, now):
            raise RecipeError(
                f"{self.run_dir} holds a finished run of another recipe: choose another run_dir, "
                f"or undo the change; {'; '.join(there)}"
            )
        return finished(self.run_dir, now)


def cells(
    name: str | None = None,
    overrides: Sequence[str] = (),
    seeds: str | None = None,
    sweep_name: str | None = None,
) -> list[Cell]:
    """Every run, in the order of the sweep file. `name` takes the place of its recipes, `seeds` of
    its seeds.

    RecipeError for what cannot be run, and where two runs share a folder.
    """
    if name is None and sweep_name is None:
        raise RecipeError(
            "nothing to submit: give --recipe, or --sweep with a file that names its recipes"
        )
    file = sweep.read(sweep_name) if sweep_name else Sweep(base=[str(name)], grid={})
    base = [name] if name else file.base
    file = file if seeds is None else file.with_seeds(parse_seeds(seeds))
    found = sweep.cells(file.model_copy(update={"base": base}), overrides)
    return [
        Cell(loading.load(cell.base, cell.overrides), Path.cwd() / cell.run_dir) for cell in found
    ]


def parse_seeds(text: str) -> list[int]:
    """`1-20`, `3`, `0,2,5-7`: each seed once, in order."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        # 10,000: a slip such as 1-2000000000 would fill the memory with recipes
        if not first <= last < first + 10_000:
            raise RecipeError(
                f"--seeds {short(text)}: expected numbers and rising ranges such as 1-20 or 0,2,5-7"
            )
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)

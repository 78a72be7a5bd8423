"""What an analysis reads: a run's export and its task's rows, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tram_ds.data.alike import read_alike
from tram_ds.data.stream import Rows, number_of
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tasks import choose as tasks

WEIGHTS = "*.safetensors"


def exported(recipe: Recipe, given: Path | None, world_size: int) -> tuple[Path, Path]:
    """(the folder with the weights, the folder for the results: its run's, or the recipe's run
    folder). given: None is the run's own. Collective; DataError on all ranks."""

    def find() -> tuple[Path, Path]:
        run_dir = recipe.resolved_run_dir()
        export = RunFolder(run_dir).export if given is None else given
        export = inner if (inner := RunFolder(export).export).is_dir() else export
        if not list(export.glob(WEIGHTS)):
            way_out = (
                "train the recipe first, or name a folder with --export"
                if given is None
                else "name a run's export folder"
            )
            raise DataError(f"{export} holds no exported weights ({WEIGHTS}): {way_out}")
        return export, export.parent if RunFolder(export.parent).recipe.is_file() else run_dir

    def sizes(found: tuple[Path, Path]) -> dict[str, Any]:
        files = sorted(found[0].glob(WEIGHTS))
        return {"names and sizes of files": [(f.name, f.stat().st_size) for f in files]}

    return read_alike(find, sizes, world_size, "the export")


def scored_rows(
    recipe: Recipe,
    domains: Sequence[str] | None,
    split: Literal["validation", "test"],
    world_size: int,
) -> tuple[Any, Mapping[str, Sequence[Any]]]:
    """(the task, its rows of `split` by domain). domains: those wanted; None, the recipe's.
    Collective; DataError on all ranks."""

    def read() -> tuple[Any, Mapping[str, Sequence[Any]]]:
        task = tasks.build(recipe, training=False)
        there = task.eval_sets(split)
        wanted = {d: rows for d, rows in there.items() if domains is None or d in domains}
        if not wanted:
            raise DataError(
                f"none of the domains chosen has a {split} split: "
                f"{', '.join(domains or task.eval_domains)}"
            )
        return task, wanted

    def facts(found: tuple[Any, Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
        counts = {f"{split} rows of {domain}": len(rows) for domain, rows in found[1].items()}
        return {**counts, "content": found[0].data_digest()}

    return read_alike(read, facts, world_size, f"task.data {recipe.task.data}")


def training_rows(recipe: Recipe, world_size: int) -> tuple[Any, Rows]:
    """(the task, its training rows). Collective; DataError on all ranks."""

    def read() -> tuple[Any, Rows]:
        task = tasks.build(recipe)
        return task, task.train_rows()

    def facts(found: tuple[Any, Rows]) -> dict[str, Any]:
        return {"training rows": number_of(found[1]), "content": found[0].data_digest()}

    return read_alike(read, facts, world_size, f"task.data {recipe.task.data}")

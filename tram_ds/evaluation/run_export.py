"""A run's export as a folder to hand on: copied, in another dtype, or with its adapters merged;
always with the card of what is in it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.files import new_folder
from tram_ds.runtime.run_layout import ADAPTER, CARD, RunFolder, made
from tram_ds.runtime.signed import is_signed

Dtype = Literal["float32", "bfloat16"]
CONFIG = "config.json"
WEIGHTS = (CONFIG, "generation_config.json", "model.safetensors", "model-")  # names begin so


@dataclass(frozen=True)
class Wanted:
    """What is to be written. whole: the model, else the adapters in peft's format. weights: whether
    they are the run's files, its model in `dtype`, or its base with the adapters merged."""

    run: RunFolder
    out: Path
    recipe: Recipe
    results: dict[str, Any]
    whole: bool
    weights: Literal["copied", "cast", "merged"]
    dtype: Dtype

    @property
    def copies(self) -> dict[str, Path]:
        """Name in `out` -> the run's file that is copied there. A card of the run's is none: it is
        written anew; one that a person has changed is."""
        export = self.run.export
        files = {str(p.relative_to(export)): p for p in _files(self.run) if not is_signed(p)}
        inside = {name: p for name, p in files.items() if name.startswith(f"{ADAPTER}/")}
        beside = {name: p for name, p in files.items() if name not in inside}
        if not self.whole or self.weights != "copied":
            beside = {name: p for name, p in beside.items() if not name.startswith(WEIGHTS)}
        return beside if self.whole else beside | {p.name: p for p in inside.values()}


def wanted(run: Path, out: Path, merge: bool, dtype: Dtype | None) -> Wanted:
    """Checks what can be checked without weights. ValueError, with the way out."""
    folder = RunFolder(run)
    if not (folder.recipe.is_file() and folder.results.is_file() and folder.export.is_dir()):
        raise ValueError(
            f"{run} is not the folder of a run that has ended, with {RunFolder.recipe}, "
            f"{RunFolder.results} and {RunFolder.export}/ in it: name one, or end the run with "
            "--resume first"
        )
    _refuse_out(run, out)
    recipe = load(str(folder.recipe))
    adapters, stored = (folder.export / ADAPTER).is_dir(), recipe.export.dtype
    if merge and not adapters:
        raise ValueError(
            f"--merge: {run} was trained without adapters, its export is the whole model: leave "
            "--merge out"
        )
    if adapters and not merge and dtype is not None:
        raise ValueError(
            f"--dtype {dtype}: adapters alone are handed on as they are, in float32: leave --dtype "
            "out, or add --merge"
        )
    if not adapters and dtype == "float32" != stored:
        raise ValueError(
            f"--dtype float32: the export is in {stored} (export.dtype) and has not kept what "
            "float32 would add: leave --dtype out"
        )
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    whole = merge or not adapters
    how = _how(folder.export, stored, dtype) if whole else "copied"
    return Wanted(folder, out, recipe, results, whole, how, dtype or stored)


def listed(plan: Wanted) -> list[str]:
    """A line a file that write() would leave."""
    lines = [_line(name, path.stat().st_size) for name, path in sorted(plan.copies.items())]
    if CARD not in plan.copies:
        lines.append(f"  {CARD}  the card")
    if plan.weights != "copied":
        lines.append(f"  {CONFIG}, model*.safetensors  {plan.weights}, in {plan.dtype}")
    return lines


def found(folder: Path) -> list[str]:
    """A line a file that is there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [_line(str(path.relative_to(folder)), path.stat().st_size) for path in paths]


def write(plan: Wanted) -> None:
    """`plan.out`, whole or not at all. By one process, which has the whole model in memory where it
    is cast or merged; the base of adapters is the recipe's `model`, so its task is opened, as
    `tram evaluate` does. ValueError."""
    from tram_ds.evaluation import card

    try:
        with new_folder(plan.out) as folder:
            if plan.weights != "copied":
                _model(plan).save_pretrained(
                    folder, max_shard_size=plan.recipe.export.max_shard_size
                )
            for name, path in plan.copies.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
            card.write(folder, plan.recipe, plan.results)
    except OSError as error:
        raise ValueError(f"--out {plan.out} cannot be written: {error}") from error


def _model(plan: Wanted) -> Any:
    import torch
    import transformers
    from transformers.utils.logging import disable_progress_bar

    from tram_ds.evaluation.card_loading import KINDS
    from tram_ds.models import adapters
    from tram_ds.models.pretrained import load_base
    from tram_ds.tasks import choose

    disable_progress_bar()
    dtype = getattr(torch, plan.dtype)
    if plan.weights == "cast":
        kind = getattr(transformers, KINDS[plan.recipe.task.name].model)
        return kind.from_pretrained(plan.run.export, dtype=dtype)
    base = choose.build(plan.recipe, training=False).model(load_base)
    return adapters.merged(base, plan.run.export / ADAPTER).to(dtype)


def _how(export: Path, stored: str, dtype: Dtype | None) -> Literal["copied", "cast", "merged"]:
    """Of a whole model. What is stored in bfloat16 is made again for float32."""
    if not (export / CONFIG).is_file():
        return "merged"
    if dtype in (None, stored):
        return "copied"
    return "cast" if stored == "float32" else "merged"


def _refuse_out(run: Path, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is there already, and is not an empty folder: name another")
    if out.resolve().is_relative_to(run.resolve()):
        raise ValueError(
            f"--out {out} is in the run's folder, which holds what a run makes alone: name another"
        )


def _files(run: RunFolder) -> list[Path]:
    """Of the export; what no run makes is left out."""
    paths = (path for path in sorted(run.export.rglob("*")) if not path.name.startswith("."))
    return [path for path in paths if path.is_file() and made(str(path.relative_to(run.path)))]


def _line(name: str, size: int) -> str:
    return f"  {name}  {size:,} bytes"

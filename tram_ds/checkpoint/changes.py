"""What changed between the recipe a checkpoint was made with and the recipe that wants to continue
it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tram_ds.algorithms.table import readers
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_layout import RunFolder

# These may change freely: they move no number, or only how the same numbers are computed and
# reported.
FREE = (
    "name",
    "run_dir",
    "tracking",
    "checkpoint",
    "engine",
    "eval",
    "export",
    "algorithm.lookahead",
    "model.logits",
    "train.stop_after",
    "train.log_every",
    "train.probe_every",
    "train.effect_every",
    "train.self_check",
    "train.max_skipped",
    "train.peak_tflops",
    "train.timeout",
)
# what early stopping goes by: not free in a run whose length it decides
MEASURED = ("eval.every_steps", "eval.key", "eval.weights")
ABSENT = "(absent)"
# What a version without the key did, where that is not what the key's default does.
FORMERLY = {"task.bos": "none"}


def kept(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as a manifest keeps it: without the tracking section and without secrets."""
    return redact({key: value for key, value in recipe.items() if key != "tracking"})


def changed(recipe_then: Mapping[str, Any], recipe_now: Mapping[str, Any]) -> list[str]:
    """One line per difference that changes the run, `optimizer.lr: 2e-05 -> 1e-05`; keys that may
    change are left out. A key that the earlier version lacks is read as what that version did."""
    then, now = _flat(kept(recipe_then)), _flat(kept(recipe_now))
    then |= _unwritten(then, now)
    # in either of them: it may have been there then and not now
    stops = any(key.startswith("train.early_stopping.") for key in then | now)
    keys = [key for key in sorted(then | now) if not free(key) or (stops and key in MEASURED)]
    return [
        f"{key}: {_show(then, key)} -> {_show(now, key)}"
        for key in keys
        if then.get(key, ABSENT) != now.get(key, ABSENT)
    ]


def _unwritten(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of now that an earlier version of this library could not write, with what it did."""
    # the default of today stands for what was done then, unless FORMERLY knows better
    found = {key: FORMERLY.get(key, default_of(key)) for key in now.keys() - then.keys()}
    # Before there were rules of the radius, null was no bound: of the rows that read one.
    bounded = then.get("algorithm.name") in readers("radius_max")
    if bounded and "algorithm.radius" in found and then.get("algorithm.radius_max", 0) is None:
        found["algorithm.radius_max"] = "none"
    return {key: _plain(value) for key, value in found.items() if value is not ABSENT}


def default_of(key: str) -> Any:
    """Of a recipe's key, or ABSENT: of one that has to be set, or is free."""
    *sections, name = key.split(".")
    model: Any = Recipe
    for section in sections:
        field = getattr(model, "model_fields", {}).get(section)
        model = field and field.annotation
    field = getattr(model, "model_fields", {}).get(name)
    return ABSENT if field is None or field.is_required() else field.get_default()


def finished(run_dir: Path, recipe_now: Mapping[str, Any]) -> bool:
    """Whether this very recipe was run to its end in this folder: these steps, this way, scored and
    exported as it says."""
    return RunFolder(run_dir).ended and not differences(run_dir, recipe_now)


def another(run_dir: Path, recipe_now: Mapping[str, Any]) -> list[str]:
    """How the finished run in this folder differs from this recipe; empty where none is there."""
    return differences(run_dir, recipe_now) if RunFolder(run_dir).ended else []


def differences(run_dir: Path, recipe_now: Mapping[str, Any]) -> list[str]:
    """Why the results in this run folder are not those of this recipe, one line per difference;
    none where they are. Of `eval` and `export`, which may change while a run goes, what its
    results depend on counts."""
    try:
        then = yaml.safe_load(RunFolder(run_dir).recipe.read_text(encoding="utf-8"))
        scored = [_flat(_scoring(recipe)) for recipe in (then, recipe_now)]
    # ValueError: also bytes that are no UTF-8; Key and Type: YAML that is no recipe
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return [f"{RunFolder.recipe}: {ABSENT} or not readable"]
    found = changed(then, recipe_now) + [
        f"{key}: {_show(scored[0], key)} -> {_show(scored[1], key)}"
        for key in sorted(scored[0] | scored[1])
        if scored[0].get(key, ABSENT) != scored[1].get(key, ABSENT)
    ]
    return list(dict.fromkeys(found))


def _scoring(recipe: Mapping[str, Any]) -> dict[str, Any]:
    keys = ["eval.splits", "eval.select", "eval.weights", "eval.initial", "eval.generate"]
    keys.append("export.dtype")
    if recipe["eval"].get("select") == "best":
        keys += ["eval.every_steps", "eval.key"]
    found = {}
    for key in keys:
        section, name = key.split(".")
        found[key] = recipe.get(section, {}).get(name, default_of(key))
    return found


def free(key: str) -> bool:
    """Whether a run that goes on may change it."""
    return any(key == name or key.startswith(f"{name}.") for name in FREE)


def _show(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else ABSENT


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted keys -> scalars and lists; tuples count as lists, as they come back from JSON."""
    if isinstance(value, Mapping) and (value or not path):
        return {
            k: v
            for key, item in value.items()
            for k, v in _flat(item, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: _plain(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | dict | None) else str(value)

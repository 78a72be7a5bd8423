"""What changed between the recipe a checkpoint was made with and the recipe that wants to continue
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tram_ds.runtime.redact import redact

# These may change freely: they move no number, or only how the same numbers are computed and
# reported.
FREE = (
    "name",
    "run_dir",
    "tracking",
    "checkpoint",
    "engine",
    "eval",
    "algorithm.lookahead",
    "model.logits",
    "train.stop_after",
    "train.log_every",
    "train.probe_every",
    "train.self_check",
    "train.max_skipped",
    "train.peak_tflops",
    "train.timeout",
)
ABSENT = "(absent)"


def kept(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as a manifest keeps it: without the tracking section and without secrets."""
    return redact({key: value for key, value in recipe.items() if key != "tracking"})


def changed(recipe_then: Mapping[str, Any], recipe_now: Mapping[str, Any]) -> list[str]:
    """One line per difference that changes the run, `optimizer.lr: 2e-05 -> 1e-05`; keys that may
    change are left out."""
    then, now = _flat(kept(recipe_then)), _flat(kept(recipe_now))
    keys = [key for key in sorted(then | now) if not _free(key)]
    return [
        f"{key}: {_show(then, key)} -> {_show(now, key)}"
        for key in keys
        if then.get(key, ABSENT) != now.get(key, ABSENT)
    ]


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


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

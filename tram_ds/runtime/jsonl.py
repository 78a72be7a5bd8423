"""Records as lines of strict JSON: no NaN, no secret, nothing that another reader would refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tram_ds.runtime.redact import redact


def encode(record: Mapping[str, Any]) -> str:
    """One record as one line of strict JSON, secrets hidden, non-finite numbers null and listed
    under `nonfinite`."""
    nonfinite: list[str] = list(record.get("nonfinite") or [])
    clean = {
        key: strict(value, nonfinite, str(key))
        for key, value in record.items()
        if key != "nonfinite"
    }
    if nonfinite:
        clean["nonfinite"] = sorted(set(nonfinite))
    return json.dumps(redact(clean), allow_nan=False, separators=(",", ":")) + "\n"


def decode(line: str) -> dict[str, Any] | None:
    """The record on a line, or None where the line is not a whole JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def strict(value: Any, nonfinite: list[str], key: str = "") -> Any:
    """`value` as plain JSON types; non-finite numbers become None and their dotted keys are
    appended to `nonfinite`."""
    if isinstance(value, Mapping):
        return {
            str(name): strict(item, nonfinite, f"{key}.{name}" if key else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [strict(item, nonfinite, f"{key}.{index}") for index, item in enumerate(value)]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = _scalar(value, key)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        nonfinite.append(key)
        return None
    return str(value)


def _scalar(value: Any, key: str) -> Any:
    """The number in a tensor or numpy scalar."""
    try:
        return value.item()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"metric `{key}` must be one number, got {type(value).__name__}: {error}"
        ) from None

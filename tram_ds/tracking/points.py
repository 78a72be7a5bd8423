"""The lines of metrics.jsonl and system.jsonl as the points MLflow stores."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tram_ds.runtime.jsonl import decode
from tram_ds.tracking.state import MAX_KEY

MAX_METRICS = 1000  # per log_batch call
_NOT_METRICS = {"step", "time", "nonfinite"}
# what MLflow calls the metrics of a step: it draws the charts of a group together
GROUPED = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "perturbed_loss": "loss/perturbed",
    "sharpness_gap": "loss/sharpness_gap",
    "distance": "radius/distance",
    "radius": "radius/radius",
    "perturbation_norm": "radius/perturbation_norm",
    "perturbation_length": "radius/perturbation_length",
    "perturbation_cosine": "radius/perturbation_cosine",
    "perturbation_projection": "radius/perturbation_projection",
    "perturbation_norm_share": "radius/perturbation_norm_share",
    "perturbation_embedding_share": "radius/perturbation_embedding_share",
    "perturbation_matrix_share": "radius/perturbation_matrix_share",
    "effect": "effect/change",
    "effect_cosine": "effect/cosine",
    "effect_masks": "effect/masks",
    "effect_gap": "effect/gap",
    "effect_norm": "effect/norm",
    "grad_norm": "optimizer/grad_norm",
    "first_grad_norm": "optimizer/first_grad_norm",
    "grad_norm_change": "optimizer/grad_norm_change",
    "lr": "optimizer/lr",
    "skipped": "optimizer/skipped",
    "tokens": "throughput/tokens",
    "seconds": "throughput/seconds",
    "tokens_per_second": "throughput/tokens_per_second",
    "mfu": "throughput/mfu",
}

Point = tuple[str, int, float, int]  # metric, step, value, unix milliseconds


def read_batches(path: Path, offset: int) -> Iterator[tuple[int, str, list[Point]]]:
    """(offset after it, digest of its last line, points) of batches of whole lines with about
    MAX_METRICS points."""
    points: list[Point] = []
    end, last_line = offset, ""
    with path.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                break  # still being written
            record = decode(line.decode("utf-8", "replace"))
            new = points_of(record) if record else []
            if points and len(points) + len(new) > MAX_METRICS:
                yield end, last_line, points
                points = []
            points.extend(new)
            end, last_line = end + len(line), digest(line)
    if end > offset:
        yield end, last_line, points


def points_of(record: Mapping[str, Any]) -> list[Point]:
    """The numbers of a record, under their names of GROUPED; nested ones as `outer/inner`;
    non-finite ones as counts, `nonfinite/<name>`."""
    step, timestamp = record.get("step"), record.get("time", 0)
    if not isinstance(step, int) or not isinstance(timestamp, int | float):
        return []
    values = {key: value for key, value in record.items() if key not in _NOT_METRICS}
    values |= {
        f"nonfinite/{str(key).replace('.', '/')}": 1 for key in record.get("nonfinite") or []
    }
    return [
        (metric_name(GROUPED.get(key, key)), step, value, int(timestamp * 1000))
        for key, value in _numbers(values)
    ]


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float):
            yield key, float(value)


def metric_name(name: str) -> str:
    """A name MLflow accepts: letters, digits, `_ - . : /` and spaces, and no path tricks.

    Where the nearest is not the name itself, a checksum follows: two names never become one.
    """
    parts = [
        part for part in re.sub(r"[^\w\-. :/]", "_", name).split("/") if part not in ("", ".", "..")
    ]
    near = "/".join(parts)
    if near == name and len(name) <= MAX_KEY and name:
        return name
    # 9: a dash and the checksum's 8 digits
    return f"{near[: MAX_KEY - 9] or '_'}-{zlib.crc32(name.encode()):08x}"


def line_digest_before(path: Path, offset: int, reach: int = 1 << 16) -> str:
    """Digest of the line that ends at `offset`; "" at 0, "?" where no line ends there."""
    if offset == 0:
        return ""
    with path.open("rb") as file:
        file.seek(max(0, offset - reach))
        data = file.read(min(offset, reach))
        whole = file.tell() == offset and data.endswith(b"\n")
    return digest(data[data.rfind(b"\n", 0, -1) + 1 :]) if whole else "?"


def digest(content: Any) -> str:
    """A short checksum of bytes or of plain JSON types: equal content, equal text."""
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return f"{zlib.crc32(data):08x}"

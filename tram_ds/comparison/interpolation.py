"""A run's scores between the pre-trained model and its own: a trade-off that costs no training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tram_ds.comparison import row_files
from tram_ds.comparison.measured_with import scoring
from tram_ds.comparison.row_files import Rows
from tram_ds.runtime.run_layout import RunFolder, rows_beside

Scores = dict[str, dict[str, float]]  # domain -> metric -> value
NAME = "interpolation.json"


def read(
    files: RunFolder, split: str, recipe: Mapping[str, Any]
) -> tuple[dict[float, Scores], dict[float, Rows], list[str]]:
    """(point, from 0 to 1 -> its scores; -> those of single rows; why some are left out); of
    evaluate's report where it lies
    in the run's folder, as `evaluate --interpolate 0.25,0.5,0.75 --out
    RUN/analysis/interpolation.json` writes it. Of a report of several models those of this run, by
    its folder's name. recipe: the run's, whose scores they stand beside."""
    there = files.analysis / NAME
    if not there.is_file():
        return {}, {}, []
    report = json.loads(there.read_text(encoding="utf-8"))
    if report["split"] != split:
        return {}, {}, []
    if other := _scored_otherwise(report.get("asked"), recipe):
        return {}, {}, [f"analysis/{NAME}: scored with {', '.join(other)}"]
    models = report["models"]
    by_place = {str(place): entry["scores"] for place, entry in enumerate(models)}
    kept, unread = row_files.read(rows_beside(there), by_place)
    places = _places(models, files)
    points = {a: by_place[place] for a, place in places.items()}
    rows = {a: kept[place] for a, place in places.items() if place in kept}
    return points, rows, [f"analysis/{why}" for why in unread]


def _scored_otherwise(asked: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> list[str]:
    """Keys of task and model that the report was made with and the run was not; a report of a
    version that did not say is taken at its word."""
    if asked is None:
        return []
    now, then = (scoring(x) for x in (asked, recipe))
    keys = [key for key in sorted(now | then) if not key.startswith("eval.")]
    return [
        f"{key} = {now.get(key, 'unset')} instead of {then.get(key, 'unset')}"
        for key in keys
        if now.get(key) != then.get(key)
    ]


def _places(models: Sequence[Mapping[str, Any]], files: RunFolder) -> dict[float, str]:
    """Point -> its place in the report."""
    return {
        float(entry["interpolation"]): str(place)
        for place, entry in enumerate(models)
        if entry["interpolation"] is not None
        if files.path.resolve().name in Path(entry["path"] or "").parts
    }

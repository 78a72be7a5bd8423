"""A run's scores between the pre-trained model and its own: a trade-off that costs no training."""

from __future__ import annotations

import json
from pathlib import Path

from tram_ds.runtime.run_layout import RunFolder

Scores = dict[str, dict[str, float]]  # domain -> metric -> value
NAME = "interpolation.json"


def read(files: RunFolder, split: str) -> dict[float, Scores]:
    """Point, from 0 to 1 -> its scores; of evaluate's report where it lies in the run's folder, as
    `evaluate --interpolate 0.25,0.5,0.75 --out RUN/analysis/interpolation.json` writes it. Of a
    report of several models those of this run, by its folder's name."""
    there = files.analysis / NAME
    if not there.is_file():
        return {}
    report = json.loads(there.read_text(encoding="utf-8"))
    if report["split"] != split:
        return {}
    return {
        float(entry["interpolation"]): entry["scores"]
        for entry in report["models"]
        if entry["interpolation"] is not None
        if files.path.resolve().name in Path(entry["path"] or "").parts
    }

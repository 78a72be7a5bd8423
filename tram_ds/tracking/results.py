"""The results of a run as MLflow shows them: metrics, a table, a picture of the training curves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tracking.metrics_log import read
from tram_ds.tracking.points import Point, points_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("loss", "perturbed_loss", "validation_loss"),
    ("distance", "radius"),
    ("grad_norm",),
    ("sharpness_gap",),
)
log = logging.getLogger(__name__)


def final_points(results: Mapping[str, Any], time: int) -> list[Point]:
    """`final/<split>/<domain>/<metric>` and `final/<split>/zero_shot/<metric>`, at the step the
    weights are of.

    results: see tram_ds.evaluation.evaluator. time: unix milliseconds. A score that is no number is
    counted as `nonfinite/final/...`.
    """
    averages = results.get("zero_shot_average") or {}
    final = {
        split: {**domains, "zero_shot": averages.get(split) or {}}
        for split, domains in results["scores"].items()
    }
    bad = [
        f"final/{split}/{domain}/{metric}"
        for split, domains in results["scores"].items()
        for domain, scores in domains.items()
        for metric, value in scores.items()
        if value is None
    ]
    step = (results.get("selected") or {}).get("step", 0)
    record = {"step": step, "time": time / 1000, "final": final, "nonfinite": bad}
    return [(name, at, value, time) for name, at, value, _ in points_of(record)]


def cost_points(
    results: Mapping[str, Any], time: int, run_dir: Path, tags: Mapping[str, str]
) -> list[Point]:
    """`cost/gpu_hours`, or `cost/rank_hours` without GPUs: the time of all recorded steps."""
    seconds = math.fsum(record.get("seconds") or 0.0 for record in read(run_dir))
    hours = seconds * int(tags.get("world_size", 1)) / 3600
    name = "gpu_hours" if tags.get("device") == "cuda" else "rank_hours"
    step = (results.get("selected") or {}).get("step", 0)
    return points_of({"step": step, "time": time / 1000, "cost": {name: hours}}) if seconds else []


def stopped_early(results: Mapping[str, Any]) -> str:
    """Of a run that ended before its last step, where and why; "" of any other."""
    found = results.get("stopped_early")
    if not found:
        return ""
    return f"stopped early at step {found['step']} of {found['of']}: {found['why']}"


def how_it_ended(run_dir: Path) -> str:
    """` (stopped early at step 40 of 100: ...)` of a finished run that did so; "" of any other."""
    try:
        text = stopped_early(json.loads(RunFolder(run_dir).results.read_text("utf-8")))
    except (OSError, ValueError, KeyError):
        return ""
    return f" ({text})" if text else ""


def samples_text(results: Mapping[str, Any]) -> str:
    """The samples as Markdown: each prompt, quoted, and what followed it; "" where there are
    none."""
    parts = []
    for sample in results.get("samples") or ():
        quoted = "\n".join(f"> {line}" for line in sample["prompt"].splitlines())
        cut = "" if sample["ended"] == "end" else " ..."
        parts.append(f"{quoted}\n\n{sample['text']}{cut}\n")
    return "\n".join(parts)


def table_json(results: Mapping[str, Any]) -> str:
    """The table mlflow.log_table would write: a row per split and domain, the metrics after
    training and before."""
    rows = [
        (split, domain, scores)
        for split, domains in results["scores"].items()
        for domain, scores in domains.items()
    ]
    metrics = list(dict.fromkeys(metric for _, _, scores in rows for metric in scores))
    trained, initial = results.get("train_domains") or [], results.get("initial") or {}
    before = metrics if initial else []
    data = [
        [
            split,
            domain,
            "trained" if domain in trained else "zero-shot",
            *(scores.get(m) for m in metrics),
        ]
        + [initial.get(split, {}).get(domain, {}).get(m) for m in before]
        for split, domain, scores in rows
    ]
    data += [
        [
            split,
            "average",
            "zero-shot",
            *(averages.get(m) for m in metrics),
            *(None for _ in before),
        ]
        for split, averages in (results.get("zero_shot_average") or {}).items()
    ]
    columns = ["split", "domain", "role", *metrics, *(f"{m} before" for m in before)]
    return json.dumps({"columns": columns, "data": data}, allow_nan=False) + "\n"


def curves(run_dir: Path) -> Figure | None:
    """Training curves over steps, one panel per group of PANELS that was recorded; None where
    nothing can be drawn."""
    try:
        from matplotlib.figure import Figure

        records = read(run_dir)
        lines = {
            name: points
            for panel in PANELS
            for name in panel
            if (
                points := [
                    (r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)
                ]
            )
        }
        panels = [shown for panel in PANELS if (shown := [name for name in panel if name in lines])]
        if not panels:
            return None
        figure = Figure(figsize=(8.0, 2.4 * len(panels)), layout="constrained")
        for axes, panel in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
        ):
            for name in panel:
                axes.plot(
                    *zip(*lines[name], strict=True),
                    label=name,
                    linewidth=1.2,
                    marker="." if len(lines[name]) < 50 else "",
                )
            axes.legend(loc="best", fontsize=8)
            axes.grid(alpha=0.3)
            axes.set_xlabel("step")
        return figure
    except Exception as error:  # a picture is never worth a run
        log.warning("no training curves for MLflow: %s", error)
        return None

"""analysis.json: what analyses of one export found, domain by domain, and its table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tram_ds.data.m2d2_names import short_names
from tram_ds.runtime.files import private_dir, write_whole
from tram_ds.runtime.jsonl import strict
from tram_ds.runtime.ranks import Job
from tram_ds.runtime.run_layout import RunFolder

# name -> column of the table
WHAT = {"sharpness": "sharpness", "cka": "CKA", "landscape": "rise", "hessian": "top eigenvalue"}


Report = dict[str, Any]


def write(report: Report, folder: Path) -> None:
    """analysis.json, and for launch/compare.py analysis/{sharpness,cka}.json: {domain: value}."""
    files = RunFolder(folder)
    write_whole(
        files.analysis_report, json.dumps(strict(report, []), indent=1, allow_nan=False) + "\n"
    )
    private_dir(files.analysis)
    for name in ("sharpness", "cka"):
        values = {
            d: found[name]["value"] for d, found in report["domains"].items() if name in found
        }
        values = {
            d: value for d, value in values.items() if value is not None and math.isfinite(value)
        }
        if values:
            write_whole(files.analysis / f"{name}.json", json.dumps(values, indent=1) + "\n")


def opened(folder: Path, about: Report) -> Report:
    """The report to add to: what analysis.json holds of the same weights and split, or a new
    one."""
    private_dir(folder)
    try:
        before = json.loads(RunFolder(folder).analysis_report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return about
    same = all(
        before.get(key) == value for key, value in about.items() if key not in ("domains", "export")
    )
    return {**about, "domains": before["domains"]} if same else about


def show(job: Job, report: Report) -> None:
    """Prints the table on rank 0."""
    if job.rank == 0:
        Console(soft_wrap=not sys.stdout.isatty()).print(table(report))


def table(report: Mapping[str, Any]) -> Table:
    """A row per domain and the average over those not trained on; the landscape's column is its
    mean rise at the line's ends."""
    there = [name for name in WHAT if any(name in found for found in report["domains"].values())]
    shown = Table(
        title=f"{escape(report['recipe'])}, {report['algorithm']}, seed {report['seed']}: "
        f"{report['split']} (* trained on)"
    )
    shown.add_column("domain")
    for name in there:
        shown.add_column(WHAT[name], justify="right")
    values = {
        domain: [_value(found, name) for name in there]
        for domain, found in report["domains"].items()
    }
    names = short_names(values)
    for domain, cells in values.items():
        mark = "*" if domain in report["train_domains"] else ""
        shown.add_row(f"{escape(names[domain])}{mark}", *map(_text, cells))
    others = [cells for domain, cells in values.items() if domain not in report["train_domains"]]
    if others:
        shown.add_section()
        shown.add_row(
            f"zero-shot average ({len(others)})",
            *(_text(_mean(column)) for column in zip(*others, strict=True)),
        )
    return shown


def _value(found: Mapping[str, Any], name: str) -> float | None:
    result = found.get(name)
    if result is None or name != "landscape":
        return None if result is None else result["value"]
    line = result["line"]
    return (line[0] + line[-1]) / 2 - line[len(line) // 2]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there and len(there) == len(values) else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

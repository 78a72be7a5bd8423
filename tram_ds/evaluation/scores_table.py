"""The scores of several models as a table of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tram_ds.data.m2d2_names import ABBREVIATIONS, short_names
from tram_ds.evaluation.per_token import told_apart


def table(report: Mapping[str, Any]) -> str:
    """The report's main metric as text: a row per model, a column per domain (M2D2's with the
    paper's names)."""
    metric = report["metric"]
    domains = list(report["models"][0]["scores"])
    names = short_names(domains)
    heads = [
        (names[name].upper() if name in ABBREVIATIONS and names[name] != name else name)
        + "*" * (name in report["train_domains"])
        for name in domains
    ]
    rows = [["model", *heads, "zero-shot"]]
    for entry in report["models"]:
        values = [entry["scores"][domain][metric] for domain in domains] + [
            entry["zero_shot_average"]
        ]
        note = " (untrained head)" if entry["untrained_head"] else ""
        rows.append([entry["name"] + note, *(_shown(value, metric) for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            t.ljust(w) if not i else t.rjust(w)
            for i, (t, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    title = f"{metric} on {report['split']} of {report['data']} (* trained on)"
    return "\n".join([title, *(line.rstrip() for line in lines), *told_apart(report["models"])])


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:,.2f}"

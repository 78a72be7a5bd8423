"""The results as one page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from tram_ds.verification.laws import Facts, Verdict, time_ratios

GIB = 2**30


def markdown(
    facts: Facts, machine: dict[str, Any], told: Sequence[Verdict], seconds: float, command: str
) -> str:
    """seconds: that the parts took together."""
    ranks = f"{facts.world} rank" + "s" * (facts.world > 1)
    memory = f", {machine['memory'] / GIB:.0f} GiB" if machine["memory"] else ""
    versions = f"torch {machine['torch']}"
    versions += f", CUDA {machine['cuda']}, NCCL {machine['nccl']}" if machine["nccl"] else ""
    lines = [
        f"# Verified on {machine['device']}, {ranks}{', small' * facts.small}",
        "",
        f"    {command}",
        "",
        f"{machine['device']}{memory}, {versions}, Python {machine['python']}, "
        f"{machine['cores']} cores, commit {machine['commit'] or 'unknown'}; "
        f"measured in {seconds / 60:.1f} minutes.",
        "",
        "## Verdict",
        "",
        *(verdict.line(number) for number, verdict in enumerate(told, 1)),
        *_parity(facts),
        *_cases(facts),
    ]
    return "\n".join(lines) + "\n"


def _sound(facts: Facts, *steps: str) -> dict[str, Any]:
    names = [name for step in steps for name in facts.expected.get(step, [])]
    results = {name: facts.results[name] for name in names if name in facts.results}
    return {n: r for n, r in results.items() if "failed" not in r and "unfit" not in r}


def _table(title: str, head: Sequence[str], body: list[list[str]]) -> list[str]:
    if not body:
        return []
    lines = ["", f"## {title}", "", "| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * (len(head) - 1))
    return [*lines, *("| " + " | ".join(line) + " |" for line in body)]


def _parity(facts: Facts) -> list[str]:
    """The worst case of each engine."""
    body = []
    for name, rows in _sound(facts, "parity").items():
        worst = max(rows, key=lambda case: rows[case]["theta"])
        engine = name.removeprefix("parity-")
        body.append([engine, str(len(rows)), f"{rows[worst]['theta']:.1e}", worst])
    head = ["engine", "cases", "worst relative error of theta", "in"]
    return _table("Parity with the float64 oracle", head, body)


def _cases(facts: Facts) -> list[str]:
    found = _sound(facts, "gpt2", "xl")
    body = [_line(name, row, r) for name, r in found.items() for row in r["rows"]]
    head = ["case", "row", "step, s", "of base (least to most)", "GiB", "of the plan"]
    head += ["planned at", "self-check GiB", "projection", "cosine", "MFU, %"]
    traces = [
        [
            name,
            *(f"{t[key] / 1e3:.1f}" for key in ("total", "compute", "collective", "exposed")),
            f"{100 * t['idle'] / t['total']:.0f}",
            f"{t['waits']:.0f}",
        ]
        for name, r in found.items()
        if (t := r["trace"]) and "failed" not in t
    ]
    said = ["case", "ms", "computing", "collectives", "exposed", "idle, %", "host waits"]
    return [
        *_table("Memory, time and what epsilon became", head, body),
        *_table("Where a step of tram_prev goes", said, traces),
    ]


def _line(name: str, row: str, r: dict[str, Any]) -> list[str]:
    of, ratios = r["rows"][row], time_ratios(r["rows"], row)
    probe = of.get("probe", {})

    def gib(key: str) -> str:
        return f"{of[key] / GIB:.2f}" if of.get(key) else ""

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        name,
        row,
        f"{median(of['seconds']):.3f}",
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        gib("peak"),
        f"{of['peak'] / of['planned']:.2f}" if of["peak"] else "",
        of["moment"],
        gib("self_check_peak"),
        number(probe.get("perturbation_projection")),
        number(probe.get("perturbation_cosine")),
        number(100 * of["mfu"], 1) if "mfu" in of else "",
    ]

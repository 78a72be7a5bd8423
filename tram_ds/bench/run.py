"""Starts one job per engine, gathers what its ranks measured, and says it in ratios: JSON, and a
table for people."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from tram_ds.bench.contenders import ENGINES, OURS, SIZES, Work

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    # what torchrun sets for its ranks, for the one process of `replicated` too
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
ON_CPU = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
TIMEOUT = 1800  # seconds for one engine
COLUMNS = (
    "engine",
    "who",
    "time / base",
    "spread",
    "tokens/s",
    "FLOPs / base",
    "collective B/param",
    "peak / base",
    "overhead",
)


def run(
    work: Work, engines: Sequence[str] = ENGINES, rows: Sequence[str] = OURS, rounds: int = 7
) -> dict[str, Any]:
    """Measures every engine in a job of its own: 1 process for replicated; for the others a rank
    per GPU, or 2 on the CPU.

    ValueError for an unknown engine, row or size; RuntimeError, with the end of its output, where a
    job fails.
    """
    for given, known, key in (
        (engines, ENGINES, "--engines"),
        (rows, OURS, "--rows"),
        ([work.size], SIZES, "--size"),
    ):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{key} {unknown[0]}: choose from {', '.join(known)}")
    if rounds < 1:
        raise ValueError(f"--rounds {rounds}: give at least 1")
    rows = list(dict.fromkeys(["base", *rows]))  # what the ratios are of
    found = [_job(name, work, rows, rounds) for name in engines]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "cores": os.cpu_count(),
    }
    return {
        "work": asdict(work),
        "rounds": rounds,
        "machine": machine,
        "engines": [{**f, "rows": summary(f)} for f in found],
    }


def _job(name: str, work: Work, rows: Sequence[str], rounds: int) -> dict[str, Any]:
    ranks = torch.cuda.device_count() or 2
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if name != "replicated"
        else []
    )
    with tempfile.TemporaryDirectory(prefix="tram_ds-bench-") as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable,
            *launcher,
            "-m",
            "tram_ds.bench.worker",
            str(out),
            name,
            json.dumps(asdict(work)),
            str(rounds),
        ]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            **QUIET,
            **({} if torch.cuda.is_available() else ON_CPU),
            "PYTHONPATH": path,
        }
        done = subprocess.run(
            [*command, *rows], env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        if done.returncode or not out.exists():
            raise RuntimeError(
                f"{name}: the job ended with {done.returncode}\n{done.stderr[-4000:]}"
            )
        return json.loads(out.read_text())


def summary(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per contender: ratios to `base` of the same round, and counts. overhead: share of the step;
    spread: least and largest."""
    base, counts = found["counts"]["base"], found["counts"]
    process, wall = found["process_seconds"]["process"], found["process_seconds"]["wall"]
    rows = {}
    for label, count in counts.items():
        ratios = [a / b for a, b in zip(process[label], process["base"], strict=True)]
        overhead = found["overhead_seconds"].get(label)
        rows[label] = {
            "time_ratio": median(ratios),
            "time_spread": [min(ratios), max(ratios)],
            "tokens_per_second": found["tokens_per_rank"]
            * found["world_size"]
            / median(wall[label]),
            "flop_ratio": count["flops"] / base["flops"],
            "bytes_per_parameter": {
                kind: size / found["parameters"] for kind, size in count["bytes"].items()
            },
            "peak_ratio": count["peak"] / base["peak"],
            "peak_bytes": count["peak"],
            "overhead": None
            if overhead is None
            else median(a / b for a, b in zip(overhead, process[label], strict=True)),
        }
    return rows


def cells(measured: dict[str, Any]) -> list[list[str]]:
    """The lines under COLUMNS."""
    lines = []
    for found in measured["engines"]:
        for label, row in found["rows"].items():
            low, high = row["time_spread"]
            share = "" if not row["overhead"] else f"{row['overhead']:.1%}"
            lines.append(
                [
                    found["engine"],
                    label,
                    f"{row['time_ratio']:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['flop_ratio']:.3f}",
                    f"{sum(row['bytes_per_parameter'].values()):.2f}",
                    f"{row['peak_ratio']:.2f}",
                    share,
                ]
            )
    return lines


def table(measured: dict[str, Any]) -> Table:
    """For a terminal."""
    shown = Table()
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("engine", "who") else "right")
    for line in cells(measured):
        shown.add_row(*line)
    return shown


def markdown(measured: dict[str, Any], command: str) -> str:
    """docs/benchmark.md: the table with the command that made it."""
    work, machine = measured["work"], measured["machine"]
    lines = ["# Benchmark", "", f"    {command}", ""]
    lines += [
        f"GPT-2 `{work['size']}`, {work['rows']} x {work['tokens']} tokens per rank, working copy "
        f"{work['dtype']}, torch "
        f"{machine['torch']}, {machine['device']}, {machine['cores']} CPU cores, one thread per "
        "rank, "
        f"{max(f['world_size'] for f in measured['engines'])} ranks (replicated: 1), "
        f"{measured['rounds']} rounds.",
        "",
        "Every engine is one job in which all take turns; ratios are to `base`, our own AdamW "
        "step, of the same round.",
        "`time`: of the process (on a GPU: wall). `collective B/param`: bytes of the whole "
        "tensors per parameter and step.",
        "`overhead`: share of the step spent on norm, ascent, publish and restore. FLOPs, bytes, "
        "peaks are exact; times depend",
        "on the machine's load.",
        "",
    ]
    lines += [
        f"Not measured: {text}."
        for text in dict.fromkeys(m for f in measured["engines"] for m in f["missing"])
    ]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells(measured)), ""])

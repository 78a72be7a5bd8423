"""Where a GPU's time went in one step, from torch.profiler's trace: what computed, what sent, and
how much of the sending was hidden behind computing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]
COLLECTIVE = "nccl"  # in the name of each of NCCL's kernels, and of no other's
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def traced(step: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The events of torch's trace of one call, as chrome://tracing has them; the device idle at
    both ends."""
    activity = ProfilerActivity.CPU
    if device.type == "cuda":
        # kernels and calls of CUDA alone: to note every operator slows the host, which has to hide
        activity = ProfilerActivity.CUDA
        torch.cuda.synchronize(device)
    with profile(activities=[activity]) as profiled:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory(prefix="tram_ds-trace-") as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def summary(events: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Microseconds from the first to the last thing the GPU did; of computing (kernels, copies,
    fills), of collectives, of these while nothing computed (`exposed`), and of nothing (`idle`);
    how often the host waited. None where no GPU did anything.

    Ranges that people name, which are drawn on the GPU's lines too, are no work.
    """
    computing: list[Interval] = []
    sending: list[Interval] = []
    waits = 0
    for event in events:
        category, name = event.get("cat"), str(event.get("name", ""))
        waits += category == "cuda_runtime" and name in WAITS
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            span = float(event["ts"]), float(event["ts"]) + float(event["dur"])
            (sending if COLLECTIVE in name.lower() else computing).append(span)
    if not computing:
        return None
    whole = united([*computing, *sending])
    total = whole[-1][1] - whole[0][0]
    busy, compute, collective = length(whole), length(united(computing)), length(united(sending))
    return {
        "total": total,
        "compute": compute,
        "collective": collective,
        "exposed": busy - compute,
        "idle": total - busy,
        "waits": waits,
    }


def united(spans: Iterable[Interval]) -> list[Interval]:
    """The same time as spans that do not touch, in order."""
    found: list[Interval] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(spans: Iterable[Interval]) -> float:
    """Of spans that do not touch."""
    return sum(end - start for start, end in spans)

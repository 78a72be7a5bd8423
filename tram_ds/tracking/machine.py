"""How busy the machine of rank 0 is: processor, memory and NVIDIA GPUs, sampled into
`<run_dir>/system.jsonl`.

The names are MLflow's own, so its pages show them under "System metrics". Nothing here runs on the
training thread, and nothing that fails here matters.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tram_ds.runtime.run_layout import RunFolder
from tram_ds.tracking.metrics_log import MetricsLog, read

MEGABYTE = 1e6
log = logging.getLogger(__name__)


class SystemMetrics:
    """Samples every `every_seconds`, and once more at `stop`; the samples are numbered on where a
    run is resumed."""

    def __init__(self, run_dir: str | Path, every_seconds: float) -> None:
        self._run_dir = Path(run_dir)
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> None:
        """Takes the last sample and ends; a driver that hangs is left behind."""
        self._stop.set()
        self._thread.join(timeout)

    def _work(self) -> None:
        try:
            self._sample_regularly()
        except Exception as error:
            log.debug("no system metrics: %s", error)

    def _sample_regularly(self) -> None:
        gpus = gpu_reader()
        processor()  # the first call only starts the measurement
        # each sample is flushed below: the log's own thread has nothing to do
        spool = MetricsLog(self._run_dir, flush_seconds=3600.0, name=RunFolder.system)
        records = read(self._run_dir, RunFolder.system)
        step = int(records[-1].get("step", -1)) + 1 if records else 0
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._every_seconds)
            try:
                spool.append({"step": step, "system": processor() | gpus()})
                spool.flush()
                step += 1
            except Exception as error:
                # a full disk, a driver that went away: the next sample may work
                log.debug("no sample of the system: %s", error)
        spool.close()


def processor() -> dict[str, float]:
    """Load since the last call, and memory in use: of the machine, and of this process."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / MEGABYTE,
    }


def gpu_reader() -> Callable[[], dict[str, float]]:
    """A function that reads every NVIDIA GPU of the machine; nothing where there is none, or no
    pynvml."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except Exception as error:  # not installed, no driver, no permission
        log.debug("no GPU metrics: %s", error)
        return dict
    return lambda: {
        k: v for i, handle in enumerate(handles) for k, v in _gpu(nvml, i, handle).items()
    }


def _gpu(nvml: Any, index: int, handle: Any) -> dict[str, float]:
    """What this GPU can tell; not every one knows its power."""
    readings: dict[str, Callable[[], float]] = {
        "utilization_percentage": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_usage_megabytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / MEGABYTE,
        "memory_usage_percentage": lambda: 100 * _used(nvml.nvmlDeviceGetMemoryInfo(handle)),
        "power_usage_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    values: dict[str, float] = {}
    for name, reading in readings.items():
        try:
            values[f"gpu_{index}_{name}"] = float(reading())
        except nvml.NVMLError:
            continue
    return values


def _used(memory: Any) -> float:
    return memory.used / memory.total

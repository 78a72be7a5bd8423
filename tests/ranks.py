"""Runs a worker module on N ranks on this machine (gloo, loopback) and returns what its rank 0
wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def environment(**extra: str) -> dict[str, str]:
    quiet = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return {**os.environ, "PYTHONPATH": str(ROOT), **quiet, **extra}


def run(module: str, *arguments: str, world: int = 2, timeout: float = 600) -> Any:
    """`python -m module OUT arguments...` on `world` ranks; rank 0 writes JSON to OUT. A failing
    rank fails with its output."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
            if world > 1
            else []
        )
        command = [sys.executable, *launcher, "-m", module, str(out), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
        )
        if done.returncode or not out.exists():
            raise AssertionError(
                f"{' '.join(command)} exited "
                f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
            )
        return json.loads(out.read_text())

"""What the ranks of a job run on: python -m tram_ds.verification.machine OUT."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import torch
from torch.cuda import nccl

from tram_ds.runtime.git import git_commit
from tram_ds.runtime.ranks import detect


def main(out: str) -> None:
    """The device's name and memory (bytes), and versions."""
    device = detect().device
    found = {
        "device": "CPU",
        "kind": device.type,
        "memory": None,
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": git_commit(),
    }
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "memory": torch.cuda.get_device_properties(device).total_memory,
            "nccl": ".".join(map(str, nccl.version())),
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`python -m tests.parity.kit_worker OUT ENGINE [ROWS...]`: the algorithm table on the device that
a run would take, a GPU where there is one, and the oracle beside it: for tram_ds/verification."""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path

import torch

from tests.parity import build
from tests.parity.worker import compare, table
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.runtime.ranks import detect, joined


def main(out: str, engine: str, *rows: str) -> None:
    """Two micro-batches a step: with one, less of an engine is asked."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # a container's variable can turn TF32 on
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    job = detect()
    with joined(job, "replicated" if engine == "single" else "sharded"):
        if engine.startswith("zero"):
            import deepspeed

            deepspeed.init_distributed(dist_backend=None)  # adopts the group that is there
        place = {"rank": job.rank, "world": job.world_size, "device": job.device}
        run = functools.partial(compare, **place)
        found = table(engine, rows or tuple(ALGORITHMS), (2,), run)
        if job.rank == 0:
            Path(out).write_text(json.dumps(found))
        build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

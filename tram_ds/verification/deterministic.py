"""A run of training with kernels that give the same bits again: python -m
tram_ds.verification.deterministic OUT RECIPE [--resume] [KEYS...]. OUT: the run's exit code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tram_ds.recipe.loading import load
from tram_ds.training.run import Request, run


def main(out: str, path: str, *words: str) -> None:
    """Rank 0 writes OUT."""
    # Without it a GPU's attention adds up the gradient of its queries in any order. cuBLAS promises
    # the same bits with a workspace of its own only, of a size that it reads at its first product.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # or new memory is filled with NaN first, which is a check of torch's and costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    resume = "--resume" in words
    keys = [word for word in words if word != "--resume"]
    code = run(load(path, keys), Request(resume=resume))
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps({"code": code}))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # threads of DeepSpeed's and gloo's can abort the interpreter's own way out, after all is done
    os._exit(0)

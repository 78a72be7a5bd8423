"""The page's script on every rank of a job, then the plain loop over the batches it read: rank 0
says how far apart they are."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import Trainer

from tests.integrations.test_transformers_trainer import ALGORITHM, SCRIPT, equal, made
from tests.wrap.hand import gap
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations import causal_lm


def main(out: str, folder: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate looks for GPUs and starts no job
    windows: list[Any] = []
    read = Trainer.get_batch_samples

    def noted(self: Trainer, *arguments: Any) -> Any:
        samples = read(self, *arguments)
        windows.append(samples[0])
        return samples

    Trainer.get_batch_samples = noted  # type: ignore[method-assign]
    sys.argv = [str(SCRIPT), folder]
    whole = runpy.run_path(str(SCRIPT))
    steps = whole["trainer"].state.max_steps
    plain = by_hand(windows, steps)
    sys.argv = [str(SCRIPT), f"{folder}-again", f"{folder}/checkpoint-3"]
    resumed = runpy.run_path(str(SCRIPT))
    found = {
        "wrapped": type(whole["trainer"].model_wrapped).__name__,
        "steps": steps,
        "windows": [len(window) for window in windows[:steps]],
        "gap": gap(whole["model"], plain),
        "resumed": equal(whole["model"], resumed["model"]),
        "apart": apart(whole["model"]),
    }
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def by_hand(windows: list[Any], steps: int) -> torch.nn.Module:
    model, _ = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)

    def factor(step: int) -> float:
        return step / 2 if step < 2 else (steps - step) / (steps - 2)

    stepper = wrap(
        DDP(model, find_unused_parameters=True),
        optimizer,
        ALGORITHM,
        seed=42,
        clip_norm=0.5,
        schedule=factor,
    )
    for window in windows[:steps]:
        stepper.step(window, causal_lm)
    return model


def apart(model: torch.nn.Module) -> float:
    """The largest difference of two ranks' weights."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    mean = mine.clone()
    dist.all_reduce(mean)
    return float((mine - mean / dist.get_world_size()).abs().max())


if __name__ == "__main__":
    main(*sys.argv[1:])

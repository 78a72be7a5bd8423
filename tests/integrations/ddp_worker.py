"""A script of the page on every rank of a job, then the plain loop over the batches it read: rank 0
says how far apart they are."""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import Trainer

from tests.integrations.plain import equal, factor, made
from tests.wrap.hand import gap
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations import AcceleratedStepper, TramCallback, causal_lm

EXAMPLES = Path(__file__).parent / "examples"


def main(out: str, script: str, folder: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate looks for GPUs and starts no job
    runs = {
        "hf_trainer": of_trainer,
        "accelerate_loop": of_accelerate,
        "lightning_fit": of_lightning,
    }
    found = runs[script](EXAMPLES / f"{script}.py", folder)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def of_trainer(script: Path, folder: str) -> dict[str, Any]:
    windows: list[Any] = []
    read = Trainer.get_batch_samples

    def noted(self: Trainer, *arguments: Any) -> Any:
        samples = read(self, *arguments)
        windows.append(samples[0])
        return samples

    Trainer.get_batch_samples = noted  # type: ignore[method-assign]
    whole = ran(script, folder)
    steps = whole["trainer"].state.max_steps
    windows = windows[:steps]
    plain = by_hand(
        windows,
        {"name": "tram_prev", "radius_scale": 10.0},
        {"weight_decay": 0.0, "fused": True},
        lambda step: factor(step, steps),
        seed=42,
    )
    resumed = ran(script, f"{folder}-again", f"{folder}/checkpoint-3")
    return told(whole, resumed, windows, plain, whole["trainer"].model_wrapped)


def of_accelerate(script: Path, folder: str) -> dict[str, Any]:
    read: list[Any] = []
    step = AcceleratedStepper.step

    def noted(self: AcceleratedStepper, batch: Any, forward: Any) -> Any:
        read.append(batch)
        return step(self, batch, forward)

    AcceleratedStepper.step = noted  # type: ignore[method-assign]
    whole = ran(script, folder)
    windows = [read[at : at + 2] for at in range(0, len(read), 2)]
    # accelerate moves a prepared scheduler once for every rank
    plain = by_hand(windows, "tram_prev", {}, lambda step: factor(2 * step), use_cache=True)
    resumed = ran(script, f"{folder}-again", folder)
    return told(whole, resumed, windows, plain, whole["model"])


def of_lightning(script: Path, folder: str) -> dict[str, Any]:
    import lightning

    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}  # a user's line for 2 ranks
    lightning.Trainer = functools.partial(lightning.Trainer, **two)  # type: ignore[misc]
    read: list[Any] = []
    keep = TramCallback._keep

    def noted(self: TramCallback, batch: Any, *arguments: Any) -> Any:
        read.append(batch)
        return keep(self, batch, *arguments)

    TramCallback._keep = noted  # type: ignore[method-assign]
    whole = ran(script, folder)
    windows = [read[at : at + 2] for at in range(0, len(read), 2)]
    plain = by_hand(windows, "tram_prev", {}, lambda step: factor(step, 12), use_cache=True)
    resumed = ran(script, f"{folder}-again", f"{folder}/step=3.ckpt")
    wrapped = type(whole["trainer"].strategy).__name__
    found = told(*({"model": x["model"].gpt2} for x in (whole, resumed)), windows, plain, None)
    return found | {"wrapped": wrapped}


def ran(script: Path, *arguments: str) -> dict[str, Any]:
    sys.argv = [str(script), *arguments]
    return runpy.run_path(str(script))


def by_hand(
    windows: list[Any],
    algorithm: Any,
    adamw: dict[str, Any],
    schedule: Callable[[int], float],
    seed: int = 0,
    **config: Any,
) -> torch.nn.Module:
    model, _ = made(**config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adamw)
    parallel = DDP(model, find_unused_parameters=True)
    stepper = wrap(parallel, optimizer, algorithm, seed=seed, clip_norm=0.5, schedule=schedule)
    for window in windows:
        stepper.step(window, causal_lm)
    return model


def told(whole: Any, resumed: Any, windows: list[Any], plain: Any, wrapped: Any) -> dict[str, Any]:
    model, again = (getattr(x["model"], "module", x["model"]) for x in (whole, resumed))
    return {
        "wrapped": type(wrapped).__name__,
        "windows": [len(window) for window in windows],
        "gap": gap(model, plain),
        "resumed": equal(model, again),
        "apart": apart(model),
    }


def apart(model: torch.nn.Module) -> float:
    """The largest difference of two ranks' weights."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    mean = mine.clone()
    dist.all_reduce(mean)
    return float((mine - mean / dist.get_world_size()).abs().max())


if __name__ == "__main__":
    main(*sys.argv[1:])

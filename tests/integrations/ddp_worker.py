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
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import Trainer

from tests.integrations.plain import equal, factor, made
from tests.wrap.hand import gap
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.integrations import AcceleratedStepper, TramCallback, causal_lm

Parallel = Callable[[torch.nn.Module], torch.nn.Module]
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


def ddp(model: torch.nn.Module) -> torch.nn.Module:
    return DDP(model, find_unused_parameters=True)


def of_trainer(script: Path, folder: str, parallel: Parallel = ddp) -> dict[str, Any]:
    windows: list[Any] = []
    read = Trainer.get_batch_samples

    def noted(self: Trainer, *arguments: Any) -> Any:
        samples = read(self, *arguments)
        windows.append(samples[0])
        return samples

    Trainer.get_batch_samples = noted  # type: ignore[method-assign]
    whole = ran(script, folder)
    steps = whole["trainer"].state.max_steps
    taken = windows[:steps]  # the resumed run reads on
    plain = by_hand(
        taken,
        {"name": "tram_prev", "radius_scale": 10.0},
        {"weight_decay": 0.0, "fused": True},
        lambda step: factor(step, steps),
        parallel,
        seed=42,
    )
    resumed = ran(script, f"{folder}-again", f"{folder}/checkpoint-2")
    return told(whole, resumed, taken, plain, whole["trainer"].model_wrapped)


def of_accelerate(script: Path, folder: str, parallel: Parallel = ddp) -> dict[str, Any]:
    read: list[Any] = []
    step = AcceleratedStepper.step

    def noted(self: AcceleratedStepper, batch: Any, forward: Any) -> Any:
        read.append(batch)
        return step(self, batch, forward)

    AcceleratedStepper.step = noted  # type: ignore[method-assign]
    whole = ran(script, folder)
    windows = [read[at : at + 2] for at in range(0, len(read), 2)]
    # accelerate moves a prepared scheduler once for every rank
    plain = by_hand(
        windows, "tram_prev", {}, lambda step: factor(2 * step), parallel, use_cache=True
    )
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
    runs = (x | {"model": x["model"].gpt2} for x in (whole, resumed))
    found = told(*runs, windows, plain, None)
    return found | {"wrapped": wrapped}


def ran(script: Path, *arguments: str) -> dict[str, Any]:
    """What it left behind, and how many steps it took."""
    sys.argv, step, taken = [str(script), *arguments], Stepper.step, []

    def counted(self: Stepper, *arguments: Any, **more: Any) -> Any:
        taken.append(self.steps)
        return step(self, *arguments, **more)

    Stepper.step = counted  # type: ignore[method-assign]
    try:
        return runpy.run_path(str(script)) | {"taken": taken}
    finally:
        Stepper.step = step  # type: ignore[method-assign]


def by_hand(
    windows: list[Any],
    algorithm: Any,
    adamw: dict[str, Any],
    schedule: Callable[[int], float],
    parallel: Parallel = ddp,
    seed: int = 0,
    **config: Any,
) -> torch.nn.Module:
    model, _ = made(**config)
    wrapped: Any = parallel(model)
    rates: Callable[[int], float] | None = schedule
    if type(wrapped).__name__ == "DeepSpeedEngine":
        optimizer, rates = wrapped.optimizer, None if wrapped.lr_scheduler else schedule
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **adamw)
    stepper = wrap(wrapped, optimizer, algorithm, seed=seed, clip_norm=0.5, schedule=rates)
    for window in windows:
        stepper.step(window, causal_lm)
    return model


def told(whole: Any, resumed: Any, windows: list[Any], plain: Any, wrapped: Any) -> dict[str, Any]:
    model, again = (getattr(x["model"], "module", x["model"]) for x in (whole, resumed))
    return {
        "wrapped": type(wrapped).__name__,
        "windows": [len(window) for window in windows],
        "gap": gap(whole_weights(model), whole_weights(plain)),
        "resumed": equal(whole_weights(model), whole_weights(again)),
        "taken": resumed["taken"],
        "apart": apart(model),
    }


def whole_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A model of plain tensors. Collective."""
    found, _ = made()
    state = {
        k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()
    }
    found.load_state_dict(state | _masters(model))
    return found


def _masters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of parameters that DeepSpeed has partitioned. Collective."""
    named = model.named_parameters(remove_duplicate=False)
    ours = {k: p for k, p in named if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")}
    if not ours:
        return {}
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {p: safe_get_full_fp32_param(p) for p in dict.fromkeys(ours.values())}
    return {k: whole[p] for k, p in ours.items()}


def apart(model: torch.nn.Module) -> float:
    """The largest difference of two ranks' weights."""
    mine = torch.cat([p.detach().flatten() for p in whole_weights(model).parameters()])
    mean = mine.clone()
    dist.all_reduce(mean)
    return float((mine - mean / dist.get_world_size()).abs().max())


if __name__ == "__main__":
    main(*sys.argv[1:])

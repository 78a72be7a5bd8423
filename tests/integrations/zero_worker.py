"""The page's scripts under accelerate's DeepSpeed plugin, on every rank of a job, beside the plain
loop over DistributedDataParallel (fp32) or over deepspeed.initialize with the config that
accelerate made: rank 0 says how far apart they are."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch.optim.lr_scheduler import LambdaLR, StepLR

from tests.integrations.ddp_worker import EXAMPLES, ddp, of_accelerate, of_trainer, ran
from tests.integrations.fsdp2_worker import of_files
from tests.integrations.plain import factor, made
from tests.wrap.hand import batches, forward, mlp, sgd
from tram_ds.algorithms.stepper import wrap
from tram_ds.integrations import AcceleratedStepper

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
WARMUP = {"warmup_min_lr": 5e-3, "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
THEIRS = {"optimizer": ADAMW, "scheduler": {"type": "WarmupLR", "params": WARMUP}}
LOOP = EXAMPLES / "accelerate_loop.py"
DUMMIES = {
    "torch.optim.AdamW(": "__import__('accelerate').utils.DummyOptim(",
    "get_linear_schedule_with_warmup(optimizer, 2, 6)": (
        "__import__('accelerate').utils.DummyScheduler(optimizer, lr_scheduler_callable="
        "lambda o: get_linear_schedule_with_warmup(o, 2, 6))"
    ),
}
FILES = LOADED = "stage 3"  # the case whose files are looked at too, of a model in partitions
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "accelerate, stage 1": ("loop", {"stage": 1}),
    "accelerate, stage 2, optimizer of the config": ("dummies", {"stage": 2, "optimizer": ADAMW}),
    "Trainer, stage 1, bf16 summed in fp32": (
        "arguments",
        {"stage": 1, "data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": "auto"}},
    ),
    "Trainer, stage 2, offloaded": (
        "arguments",
        {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": "auto",
        },
    ),
    "Trainer, stage 3": ("arguments", {"stage": 3}),
    "Trainer, stage 3, bf16, both of the config": (
        "arguments",
        {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            "bf16": {"enabled": "auto"},
            **THEIRS,
        },
    ),
}


def main(out: str, folder: str) -> None:
    on_cpu()
    configs = noted_configs()
    found = {
        name: KINDS[kind](f"{folder}/{name}", config(**keys), configs)
        for name, (kind, keys) in CASES.items()
    }
    found["a step that is not finite"] = {
        "stage 1 in fp32": skipped({"data_types": {"grad_accum_dtype": "fp32"}}),
        "stage 1": skipped({}),
    }
    found["refused"] = harmful()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def config(**keys: Any) -> dict[str, Any]:
    zero = {k: keys.pop(k) for k in list(keys) if k.startswith(("stage", "offload"))}
    return {**dict.fromkeys(AUTO, "auto"), "zero_optimization": zero, **keys}


def of_arguments(folder: str, told: dict[str, Any], configs: list[Any]) -> dict[str, Any]:
    """hf_trainer.py with a user's line for DeepSpeed."""
    more = {"deepspeed": told, "bf16": "bf16" in told}
    made = functools.partial(transformers.TrainingArguments, **more)
    script = EXAMPLES / "hf_trainer.py"
    if folder.endswith(LOADED):
        script = in_partitions(script, folder)
    with mock.patch.object(transformers, "TrainingArguments", made):
        found = of_trainer(script, folder, plain(configs, split=True) if more["bf16"] else ddp)
    if folder.endswith(FILES):
        saved = f"{folder}/checkpoint-2"
        with mock.patch.object(
            transformers, "TrainingArguments", functools.partial(made, weight_decay=0.1)
        ):
            found["another"] = refusal(script, folder, saved)
        with mock.patch.object(transformers, "TrainingArguments", made):
            found |= of_files(script, saved)
    return found


def in_partitions(script: Path, folder: str) -> Path:
    """The script with a model that is loaded behind TrainingArguments, and so one that DeepSpeed
    has partitioned by then."""
    pretrained = f"{folder}-pretrained"
    if dist.get_rank() == 0:
        made()[0].save_pretrained(pretrained)
    dist.barrier()
    load = f"model = GPT2LMHeadModel.from_pretrained({pretrained!r})\n"
    text, at = script.read_text(), "trainer = TramTrainer("
    assert at in text
    found = Path(f"{folder}-{dist.get_rank()}.py")
    found.write_text(text.replace(at, f"{load}assert model.lm_head.weight.ds_id >= 0\n{at}"))
    return found


def refusal(script: Path, folder: str, saved: str) -> str:
    """What a resume as another run says."""
    try:
        ran(script, f"{folder}-another", saved)
    except ValueError as error:
        return str(error)
    return ""


def of_loop(
    folder: str, told: dict[str, Any], configs: list[Any], script: Path = LOOP
) -> dict[str, Any]:
    """accelerate_loop.py with a user's line for DeepSpeed."""
    accelerator = accelerate.Accelerator

    def made(**more: Any) -> accelerate.Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = DeepSpeedPlugin(hf_ds_config=copy.deepcopy(told))
        return accelerator(deepspeed_plugin=plugin, **more)

    with mock.patch.object(accelerate, "Accelerator", made):
        return of_accelerate(script, folder, ddp if script is LOOP else plain(configs))


def of_dummies(folder: str, told: dict[str, Any], configs: list[Any]) -> dict[str, Any]:
    """The same where the config names the optimizer, which accelerate has stand-ins for."""
    text = LOOP.read_text()
    for line, instead in DUMMIES.items():
        assert line in text
        text = text.replace(line, instead)
    script = Path(f"{folder}-{dist.get_rank()}.py")
    script.write_text(text)
    return of_loop(folder, told, configs, script)


def rates(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, factor)


KINDS: dict[str, Callable[..., dict[str, Any]]]
KINDS = {"arguments": of_arguments, "loop": of_loop, "dummies": of_dummies}


def noted_configs() -> list[dict[str, Any]]:
    """Of every engine that accelerate makes from now on."""
    found: list[dict[str, Any]] = []
    begin = deepspeed.initialize

    def noted(**arguments: Any) -> Any:
        if "config_params" in arguments:  # accelerate's way to say it
            found.append(copy.deepcopy(arguments["config_params"]))
        return begin(**arguments)

    deepspeed.initialize = noted
    return found


def plain(configs: list[dict[str, Any]], split: bool = False) -> Callable[[Any], Any]:
    """What a person would call of DeepSpeed. split: into the groups that Trainer makes."""

    def parallel(model: torch.nn.Module) -> Any:
        own: dict[str, Any] = {"model_parameters": model.parameters()}
        if "optimizer" not in configs[-1]:
            every = list(model.parameters())
            groups = [[p for p in every if p.dim() > 1], [p for p in every if p.dim() < 2]]
            own["optimizer"] = torch.optim.AdamW(
                [{"params": group} for group in groups] if split else every,
                lr=1e-2,
                weight_decay=0.0,
                fused=True,
            )
        elif "scheduler" not in configs[-1]:
            own["lr_scheduler"] = rates
        return deepspeed.initialize(model=model, config=configs[-1], **own)[0]

    return parallel


def skipped(more: dict[str, Any]) -> list[float]:
    """The rate before a step that is not finite, after it, and after one that is."""
    AcceleratorState._reset_state(reset_partial_state=True)
    told = config(stage=1, bf16={"enabled": True}, **more) | {"train_micro_batch_size_per_gpu": 4}
    plugin = DeepSpeedPlugin(hf_ds_config=told)
    accelerator, model = accelerate.Accelerator(deepspeed_plugin=plugin), mlp()
    optimizer = sgd(model)
    prepared = accelerator.prepare(model, optimizer, StepLR(optimizer, 1, 0.5))
    stepper = AcceleratedStepper(accelerator, *prepared[:2], "sam", rho=0.1)
    (batch,) = batches(1)
    found = [*prepared[2].get_last_lr()]
    for poison in (float("nan"), 1.0):
        with accelerator.accumulate(prepared[0]):
            stepper.step(((batch[0] * poison).bfloat16(), batch[1]), forward)
            prepared[2].step()
        found += prepared[2].get_last_lr()
    return found


def harmful() -> str:
    """What wrap() says of an engine whose config cannot be trained right."""
    zero = {"stage": 2, "round_robin_gradients": True}
    told = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}
    told["zero_allow_untested_optimizer"] = True
    model = mlp()
    engine = deepspeed.initialize(model=model, optimizer=sgd(model), config=told)[0]
    try:
        wrap(engine)
    except ValueError as error:
        return str(error)
    return ""


def on_cpu() -> None:
    """accelerate gives DeepSpeed devices alone: what it sets there, on the CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    def backend(*_: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = backend  # type: ignore[method-assign]
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # type: ignore


if __name__ == "__main__":
    main(*sys.argv[1:])

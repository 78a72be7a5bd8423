"""What of accelerate, transformers' Trainer and Lightning cannot go together with two backward
passes a step."""

from __future__ import annotations

import os
from typing import Any

from tram_ds.algorithms.said import dropout_is_active
from tram_ds.integrations import deepspeed_plugin

FORWARD = "pass forward=, (model, batch) -> (loss_sum, count, logits (N, C)), with the loss"


def refuse(trainer: Any, *, own_forward: bool) -> None:
    """ValueError for the first thing that cannot be trained right. own_forward: the user brings the
    loss."""
    found = [*_accelerator(trainer.accelerator), *_trainer(trainer), *_options(trainer.args)]
    found += [] if own_forward else _losses(trainer)
    for wrong, message in found:
        if wrong:
            raise ValueError(message)


def refuse_accelerator(accelerator: Any) -> None:
    """ValueError for the first thing of an Accelerator that cannot be trained right."""
    for wrong, message in _accelerator(accelerator):
        if wrong:
            raise ValueError(message)


def refuse_recomputation(accelerator: Any, model: Any) -> None:
    """ValueError where accelerate recomputes activations that dropout has passed: it draws other
    masks for them. model: as it trains, in train mode."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "activation_checkpointing", False) and dropout_is_active(model):
        raise ValueError(
            "activation_checkpointing of accelerate's FSDP plugin recomputes a block with other "
            "dropout masks than its loss had, so that the gradient is of neither: leave it out and "
            "set gradient_checkpointing=True of TrainingArguments "
            "(model.gradient_checkpointing_enable()), or dropout 0 in the model's config"
        )


def refuse_lightning(trainer: Any, module: Any) -> None:
    """ValueError for the first thing of Lightning's Trainer that cannot be trained right."""
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden

    strategy, precision = trainer.strategy, str(trainer.precision)
    hooks = ("optimizer_step", "configure_gradient_clipping", "optimizer_zero_grad", "backward")
    own = [name for name in hooks if is_overridden(name, module)]
    found = [
        (
            not isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)),
            f"strategy {type(strategy).__name__}: use ddp, or train shards with launch/train.py or "
            "wrap()",
        ),
        (
            precision not in ("32-true", "bf16-mixed"),
            f"precision {precision}: use 32-true, or bf16-mixed, whose weights are fp32",
        ),
        (
            not module.automatic_optimization,
            "automatic_optimization = False: such a training_step takes its steps itself: call "
            "wrap(...).step there",
        ),
        (own, f"{', '.join(own)} of {type(module).__name__} would not be called: leave it out"),
        (
            getattr(trainer.gradient_clip_algorithm, "value", "norm") not in (None, "norm"),
            "gradient_clip_algorithm value: the second gradient is clipped by its norm",
        ),
    ]
    for wrong, message in found:
        if wrong:
            raise ValueError(message)


def _accelerator(accelerator: Any) -> list[tuple[Any, str]]:
    state = accelerator.state
    sharding = getattr(state, "fsdp_plugin", None)
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    return [
        *deepspeed_plugin.refusals(accelerator),
        (
            sharding is not None and sharding.fsdp_version != 2,
            "fsdp: FSDP1 cannot run two backward passes a step: use FSDP2, fsdp_version=2 of "
            "accelerate's plugin or fsdp_config={'version': 2} of TrainingArguments",
        ),
        (
            sharding is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
            "fsdp: accelerate shards over the GPUs of a job alone, and here would train whole "
            "weights without a word: start it with torchrun on GPUs, or leave fsdp out",
        ),
        (
            getattr(accelerator, "parallelism_config", None) is not None,
            "parallelism_config: tensor, context and sequence parallel ranks share a batch, which "
            "wrap() does not know: leave it out",
        ),
        (
            kind.startswith(("MEGATRON", "XLA")),
            f"{kind}: it has an optimizer step of its own: use DDP",
        ),
        (
            accelerator.mixed_precision not in ("no", "bf16"),
            f"mixed precision {accelerator.mixed_precision}: a scaled loss skips steps that the "
            "radius was computed for: use bf16",
        ),
    ]


def _trainer(trainer: Any) -> list[tuple[Any, str]]:
    args = trainer.args
    return [
        (
            trainer.is_fsdp_xla_enabled or trainer.is_distributed_loading_by_transformers,
            "a model sharded by XLA or when it was loaded: load it whole, and use DDP",
        ),
        (
            args.n_gpu > 1,
            f"{args.n_gpu} GPUs in one process (DataParallel): start with torchrun, or show one "
            "(CUDA_VISIBLE_DEVICES=0)",
        ),
    ]


def _options(args: Any) -> list[tuple[Any, str]]:
    optimizer = str(getattr(args.optim, "value", args.optim))
    return [
        (
            "lomo" in optimizer or optimizer.startswith("schedule_free"),
            f"optim {optimizer}: it moves weights outside step(): use adamw_torch",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size: it begins again within a window: set "
            "per_device_train_batch_size to what fits",
        ),
        (
            args.neftune_noise_alpha is not None,
            "neftune_noise_alpha: noise of its own would be in every pass: leave it out, or use "
            "algorithm='tram_x', whose noise has its place",
        ),
        (
            args.torch_empty_cache_steps is not None,
            "torch_empty_cache_steps: no step empties the cache here: leave it out",
        ),
    ]


def _losses(trainer: Any) -> list[tuple[Any, str]]:
    from transformers import Trainer

    own = type(trainer).compute_loss is not Trainer.compute_loss
    return [
        (own, f"compute_loss of {type(trainer).__name__} would not be asked: {FORWARD}"),
        (
            trainer.compute_loss_func is not None,
            f"compute_loss_func would not be asked: {FORWARD}",
        ),
        (
            trainer.label_smoother is not None,
            f"label_smoothing_factor {trainer.args.label_smoothing_factor}: {FORWARD}",
        ),
    ]

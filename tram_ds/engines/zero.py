"""Engine for DeepSpeed ZeRO stages 0-3, fp32 and bf16, with optimizer and parameter offload. The
only file that imports it.

Collectives: a pass is DeepSpeed's own reduction (and, at stage 3, gathering); norms are summed over
the partition group (none at stage 0); `write` and `restore` gather the working copy; `step` is
DeepSpeed's own.

What DeepSpeed would do silently and this engine does not: the accumulation boundary is set
explicitly (or stage 2 keeps only the last micro-batch); gradients are cleared between the passes
(or they add up); stage 3's padding is zeroed; its persistent parameters are released and gathered
again when the weights move; what zero_harmful has is refused; Adam's state at stage 0 with bf16 is
emptied of the step DeepSpeed takes when it is built.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from tram_ds.engines import filling, layout, optimizer_refusals
from tram_ds.engines.filling import Fill
from tram_ds.engines.protocol import Engine
from tram_ds.engines.schedule import Schedule
from tram_ds.engines.zero_harmful import harmful
from tram_ds.engines.zero_storage import Bf16Partitioned, Partitioned, Storage
from tram_ds.engines.zero_weights import Zero, base_optimizer, partition_of
from tram_ds.engines.zero_whole import Stage3, Whole


def over(
    engine: Any, *, clip_norm: float | None = None, schedule: Schedule | None = None
) -> Engine:
    """An engine over what deepspeed.initialize returned; clips by its gradient_clipping where no
    clip_norm is given. Collective."""
    _refuse(engine)
    weights = Zero(engine, _storage(engine))
    clip_norm = clip_norm or (engine.gradient_clipping() or None)
    # DeepSpeed would clip by the norm of a gradient that is still a sum over targets.
    engine._config.gradient_clipping = 0.0
    if hasattr(engine.optimizer, "clip_grad"):
        # ZeRO's wrappers clip by a copy of the config's value, taken when they were built
        engine.optimizer.clip_grad = 0.0  # clipped once, by descend, over the true norm
    return Engine(weights, clip_norm=clip_norm, schedule=schedule)


def _storage(engine: Any) -> Storage:
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Stage3(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return Partitioned(optimizer, all_gather_dp_groups)
    if isinstance(optimizer, BF16_Optimizer):
        return Bf16Partitioned(optimizer, all_gather_dp_groups)
    # only now: stage 3's optimizer has groups of that name too
    if hasattr(optimizer, "fp16_groups"):
        # Its constructor took an optimizer step with zero gradients: undo what that left in the
        # moments and the masters.
        optimizer.optimizer.state.clear()
        whole = Whole(engine, optimizer)
        with torch.no_grad():
            for (master, _), half in zip(whole.pairs, whole.working(), strict=True):
                master.view(-1).copy_(half)
        return whole
    return Whole(engine, optimizer)


def _refuse(engine: Any) -> None:
    """ValueError for what cannot be trained right, naming the setting."""
    if engine.optimizer is None:
        raise ValueError(
            "the DeepSpeed engine has no optimizer: pass optimizer= to deepspeed.initialize"
        )
    if wrong := harmful(dict(engine._config.zero_config)):
        raise ValueError(wrong)
    if engine.fp16_enabled():
        raise ValueError(
            "fp16.enabled: true needs loss scaling, under which a perturbation has no fixed size: "
            "use bf16"
        )
    if hasattr(engine, "train_batch") and type(engine).__name__ == "PipelineEngine":
        raise ValueError("a pipeline-parallel engine has no forward pass of a whole model")
    optimizer_refusals.refuse_optimizer(base_optimizer(engine), sharded=True)
    accumulated = getattr(engine.optimizer, "averaged_gradients", None) or {}
    if any(v is not None for v in accumulated.values()) or any(
        p.grad is not None for p in engine.module.parameters()
    ):
        raise ValueError(
            "the DeepSpeed engine is in the middle of an accumulation: call engine.step() before "
            "wrapping it"
        )


def build(model: nn.Module, settings: Any) -> Engine:
    """See tram_ds.engines.build: fills in what the recipe owns (batch sizes, precision) and nothing
    else."""
    deepspeed.init_distributed(dist_backend=None)  # adopts the group that the job has joined
    config = {
        **settings.config,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        # what DeepSpeed divides every loss by, which Zero.backward undoes
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "bf16": {"enabled": settings.dtype == torch.bfloat16},
    }
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if settings.dtype == torch.bfloat16 and stage in (2, 3):
        # sharded there; at stage 1 it would be a full fp32 copy
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    blocks = layout.transformer_blocks(model)
    frozen = any(not p.requires_grad for p in model.parameters())
    if stage == 3 and settings.one_backward and blocks and not frozen:
        # A block's parameters are gathered together: DeepSpeed's hooks on each of its modules take
        # a GPU several times as long as the block itself. It dies where a block is run twice
        # before its backward pass, and where some of a block is frozen.
        set_z3_leaf_modules(model, [type(blocks[0])])
    # before initialize, which casts the model
    fill = settings.fill or _kept(model)
    if settings.fill is not None and stage == 3:
        _partition(model, config, settings.fill, settings.dtype)
    elif settings.fill is not None:
        filling.fill_whole(model, settings.fill, settings.job.device, settings.dtype)
    wrapped = deepspeed.initialize(model=model, optimizer=settings.optimizer(model), config=config)[
        0
    ]
    engine = over(wrapped, clip_norm=settings.clip_norm, schedule=settings.schedule)
    if settings.dtype == torch.bfloat16 or settings.fill is not None:
        # DeepSpeed makes its fp32 masters from weights it has already rounded to bf16
        assert isinstance(engine.weights, Zero)
        engine.weights.set_masters(fill)
    return engine


def _kept(model: nn.Module) -> Fill:
    """Reads the model's own fp32 values, which DeepSpeed leaves to us: its cast to bf16 gives the
    parameters new memory."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def fill(name: str, start: int, into: Tensor) -> None:
        into.copy_(values[name].flatten()[start : start + into.numel()])

    return fill


def _partition(model: nn.Module, config: dict[str, Any], fill: Fill, dtype: torch.dtype) -> None:
    """A meta model as ZeRO stage 3 partitions, with one parameter in memory at a time. Collective.

    Not by zero.Init around the model's construction, which casts every float buffer made inside it,
    rotary tables too, and says nothing.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    # memory of one element for now: a parameter gets its full size when its turn comes
    meta = set(filling.materialise(model, lambda p: torch.empty(1, dtype=dtype)))
    first: Any = None
    for name, parameter in list(model.named_parameters()):
        # a new head is there already; DeepSpeed no longer casts a model that is partitioned
        parameter.data = (
            torch.empty(shapes[name], dtype=dtype) if name in meta else parameter.data.to(dtype)
        )
        if first is None:
            # zero.Init partitions at once all that a module has: one parameter, so one in memory
            alone, first = nn.Module(), parameter
            alone.register_parameter("parameter", parameter)
            deepspeed.zero.Init(module=alone, config_dict_or_path=config)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])  # as DeepSpeed's own engine
        if not parameter.requires_grad:  # in no optimizer, so nobody writes it later
            found = partition_of(name, parameter)
            assert found is not None, "it has just been partitioned"
            span, piece = found
            fill(name, span.start, piece)

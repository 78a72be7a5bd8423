"""Engine for DeepSpeed ZeRO stages 0-3, fp32 and bf16, with optimizer and parameter offload. The
only file that imports it.

Collectives: `backward` is DeepSpeed's own reduction (and, at stage 3, gathering) plus five sums;
`norm` all-reduces one scalar over the partition group (none at stage 0); `moved` gathers the
working copy on its way in and, unless `descend` is next, out; `descend` is DeepSpeed's step.

What DeepSpeed would do silently and this engine does not: the accumulation boundary is set
explicitly (or stage 2 keeps only the last micro-batch); gradients are cleared between the passes
(or they add up); stage 3's padding is zeroed; its persistent parameters are released and gathered
again when the weights move; `round_robin_gradients` is refused (its map of parameters to partitions
is wrong); Adam's state at stage 0 with bf16 is emptied of the step DeepSpeed takes when it is
built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from tram_ds.engines import protocol as base
from tram_ds.engines.shards import Lazy, Shards, Span
from tram_ds.engines.zero_storage import Bf16Partitioned, Partitioned, Stage3, Storage, Whole


class Zero:
    """masters: DeepSpeed's fp32 partitions, viewed parameter by parameter, so padding is never part
    of a Shards."""

    displaced, undivided = False, False

    def __init__(
        self, engine: Any, *, clip_norm: float | None = None, schedule: base.Schedule | None = None
    ):
        _refuse(engine)
        self.model, self.module = engine, engine.module
        self.storage = _storage(engine)
        self.clip_norm = clip_norm or (engine.gradient_clipping() or None)
        engine._config.gradient_clipping = 0.0
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = 0.0  # clipped once, by take_step, over the true norm
        self.schedule = schedule
        names: dict[Any, str] = dict(base.parameter_names(self.module))
        self.fragments = self.storage.fragments()
        self.layout = tuple(
            Span(names[f.parameter], f.start, f.length, _shape(f.parameter)) for f in self.fragments
        )
        self.device = torch.device(engine.device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shard_group = self.storage.group
        self.owns = self.shard_group is not None or self.rank == 0
        self.replicas = 1 if self.shard_group is not None else self.world_size
        self.dtype = self.storage.working()[0].dtype
        self.steps = base.optimizer_steps(_base_optimizer(engine))
        self.targets = torch.ones((), dtype=torch.float64, device=self.device)
        self._theta: Shards | None = None

    def _view(self, flats: Sequence[Tensor]) -> Shards:
        pieces = (
            flats[f.flat].detach().view(-1)[f.offset : f.offset + f.length] for f in self.fragments
        )
        return Shards(pieces, self.layout)

    def params(self, keep: bool = False) -> Shards:
        """Live views of the masters where the working copy is other memory: `moved` then costs no
        copy of the weights."""
        live = self._view(self.storage.masters())
        if self.storage.separate:
            return live.clone() if keep else live
        if self._theta is None:
            self._theta = live.clone()
        return self._theta

    def raw_gradient(self) -> Shards:
        pieces = self.storage.gradient()
        return Shards(
            (_within(pieces[f.flat], f.offset, f.length) for f in self.fragments), self.layout
        )

    def grads(self) -> Lazy:
        return base.mean_gradient(self)

    def put_gradient(self, g: Shards | Lazy) -> None:
        self.raw_gradient().copy_(g)
        self.targets = torch.ones_like(self.targets)

    def working(self) -> Lazy:
        return Lazy(Shards.wide, self._view(self.storage.working()))

    def norm(self, x: Shards | Lazy) -> Tensor:
        total = x.square_sum(self.device).to(self.device)
        if self.shard_group is not None:
            dist.all_reduce(total, group=self.shard_group)
        return total.sqrt()

    def data_sum(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    def _publish(self, values: Shards | Lazy) -> None:
        if isinstance(self.storage, Stage3):
            self.storage.release()
        self._view(self.storage.working()).copy_(values)
        self.storage.publish()

    @contextmanager
    def moved(self, to: Shards | Lazy, until_descent: bool = False) -> Iterator[None]:
        theta, self.displaced = self.params(), True
        self._publish(to)
        del to  # it may hold the gradient it was computed from
        try:
            yield
        except BaseException:
            self._restore(theta)
            raise
        if not (until_descent and self.storage.separate):
            self._restore(theta)

    def _restore(self, theta: Shards) -> None:
        if self.storage.separate:
            self.storage.restore()
        else:
            self._publish(theta)
        self.displaced = False

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the engine's own forward owns its precision

    def clear(self) -> None:
        self.storage.clear()

    def backward_one(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed divides by gradient_accumulation_steps and averages over ranks; run_pass wants a
        # sum.
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.model.gradient_accumulation_steps())

    def backward(
        self,
        batches: Sequence[Any],
        objective: base.Objective,
        weighted: base.Weighted | None = None,
        alone: bool = False,
    ) -> base.Means:
        assert not alone, "a sharded engine has no gradient of one rank"
        return base.run_pass(self, batches, objective, weighted)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return _base_optimizer(self.model).param_groups

    def optimizer_step(self) -> None:
        self.model.set_gradient_accumulation_boundary(True)
        self.model.step()

    def descend(self, finite: Tensor, grad_norm: Tensor) -> base.StepInfo:
        info = base.take_step(self, finite, grad_norm)
        # a step taken has published theta_{t+1} over theta_t + epsilon
        if self.displaced and info.skipped:
            self._restore(self.params())
        self._theta, self.displaced = None, False
        return info

    def moments(self) -> dict[str, Shards]:
        found = base.named_moments(_base_optimizer(self.model), self.storage.state_keys())
        return {key: self._view(self.storage.cut(tensors)) for key, tensors in found.items()}

    def set_masters(self, value: Callable[[Span], Tensor]) -> None:
        """Masters := value(span), working copy after them. Collective."""
        masters = self._view(self.storage.masters())
        masters.copy_(
            masters.map(lambda span, piece: value(span).to(piece.device).view(piece.shape))
        )
        self.storage.restore()

    def load(self, params: Shards, moments: dict[str, Shards], steps: int) -> None:
        self._theta, self.steps = None, steps
        self._view(self.storage.masters()).copy_(params)
        optimizer = _base_optimizer(self.model)
        for key in self.storage.state_keys():
            state: dict[str, Any] = {name: torch.zeros_like(key.detach()) for name in moments}
            if "exp_avg" in state:  # a count each: a shared tensor would count every sub-group
                state["step"] = base.step_count(optimizer, steps, key.device)
            optimizer.state[key] = state
        for name, shards in moments.items():
            self._view(
                self.storage.cut([optimizer.state[key][name] for key in self.storage.state_keys()])
            ).copy_(shards)
        self.storage.restore()


def _within(pieces: Sequence[Tensor], offset: int, length: int) -> Tensor:
    """A flat view of elements [offset, offset + length) of the pieces laid end to end; a fragment
    never straddles two."""
    for piece in pieces:
        if offset + length <= piece.numel():
            return piece.detach().view(-1)[offset : offset + length]
        offset -= piece.numel()
    raise AssertionError("a parameter's gradient lies in one piece")


def _storage(engine: Any) -> Storage:
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return Stage3(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return Partitioned(optimizer, all_gather_dp_groups)
    if isinstance(optimizer, BF16_Optimizer):
        return Bf16Partitioned(optimizer, all_gather_dp_groups)
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
    if getattr(engine.optimizer, "round_robin_gradients", False):
        raise ValueError(
            "zero_optimization.round_robin_gradients: true maps parameters to wrong partitions: "
            "set it to false"
        )
    if engine.fp16_enabled():
        raise ValueError(
            "fp16.enabled: true needs loss scaling, under which a perturbation has no fixed size: "
            "use bf16"
        )
    accumulated = getattr(engine.optimizer, "averaged_gradients", None) or {}
    if any(v is not None for v in accumulated.values()) or any(
        p.grad is not None for p in engine.module.parameters()
    ):
        raise ValueError(
            "the DeepSpeed engine is in the middle of an accumulation: call engine.step() before "
            "wrapping it"
        )


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper; its param_groups are the ones that move the
    weights."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _shape(p: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def build(model: nn.Module, settings: Any) -> Zero:
    """See tram_ds.engines.build: fills in what the recipe owns (batch sizes, precision) and nothing
    else."""
    deepspeed.init_distributed(dist_backend=None)
    config = {
        **settings.config,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "bf16": {"enabled": settings.dtype == torch.bfloat16},
    }
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if settings.dtype == torch.bfloat16 and stage in (2, 3):
        # sharded there; at stage 1 it would be a full fp32 copy
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    exact = (
        {name: p.detach().clone() for name, p in model.named_parameters()}
        if settings.dtype == torch.bfloat16
        else {}
    )
    wrapped = deepspeed.initialize(model=model, optimizer=settings.optimizer(model), config=config)[
        0
    ]
    engine = Zero(wrapped, clip_norm=settings.clip_norm, schedule=settings.schedule)
    if exact:  # DeepSpeed makes its fp32 masters from weights it has already rounded to bf16
        engine.set_masters(
            lambda span: exact[span.name].flatten()[span.start : span.start + span.length]
        )
    return engine

"""Bytes per GPU of one run, part by part, as tram_ds's engines hold them: counted from the code, checked against real tensors.

The peak may be the loss of a pass (activations and logits; in pass 2 also the ascent's copies), its backward (gradients and
gathered parameters instead of the logits' fp32 copies), the distance, the ascent's arithmetic or the optimizer's step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tram_ds.algorithm import Algorithm
from tram_ds.planning.sizes import Size
from tram_ds.region import AtWeights, NoisedInput, Previous

FP32 = 4
HELD = 3  # sharded fp32 copies alive during pass 2: g, epsilon, theta + epsilon
ARITHMETIC = 5  # the same while epsilon is computed: g, |theta|, |theta| g, their product, epsilon
CHUNK = 64 * 2**20  # bytes: tram_ds.distance works on chunks of this much fp32


@dataclass(frozen=True)
class Setup:
    """What the engine's config says. shards: ranks that share one copy of the states. kept: moments per parameter.

    bucket, live: elements of a reduction bucket, and of gathered parameters that ZeRO-3 may keep.
    """

    engine: str  # replicated, fsdp2, zero0, zero1, zero2 or zero3
    world: int
    shards: int
    half: bool
    kept: int
    micros: int
    checkpointing: bool
    reshard: bool = True
    offload_states: bool = False
    offload_parameters: bool = False
    bucket: int = 500_000_000
    live: int = 1_000_000_000

    @property
    def working(self) -> int:
        """Bytes per element of what forward reads."""
        return 2 if self.half else FP32

    @property
    def separate(self) -> bool:
        """Masters and working copy are different memory, so an ascent needs no copy of theta."""
        return self.engine in ("zero1", "zero2", "zero3") or (self.engine == "zero0" and self.half)

    @property
    def gradient(self) -> int:
        """Bytes per element of the reduced gradient."""
        return 2 if self.half and self.engine in ("zero0", "zero1") else FP32


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak; moment: when that is."""

    moment: str
    masters: int
    moments: int
    gradients: int
    working_copy: int
    theta_snapshot: int
    references: int
    ascent: int
    activations: int
    logits: int
    buffers: int

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.total - self.activations - self.logits

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by part, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}


def peak(setup: Setup, size: Size, row: Algorithm) -> Memory:
    """The parts at the moment of the largest sum."""
    states, shard = _states(setup, size, row), 0 if setup.offload_states else FP32 * -(-size.parameters // setup.shards)
    climbs, extra = row.ascent is not None, 2 * row.per_micro_batch
    held = (HELD + (row.fisher_pass is not None) + extra) * shard if climbs else 0
    computing = (ARITHMETIC + extra) * shard if climbs else 0
    kept, recomputed = _activations(setup, size, row)
    one, cached = size.positions * size.classes, _cached(setup, size, row)
    early = states if _gradients_stay(setup) else {**states, "gradients": 0}
    gathered, buffers = _buffers(setup, size)
    moment = "pass 2" if climbs else "the pass"
    pass_ = {"ascent": held, "activations": kept}
    candidates = [
        Memory(f"the loss of {moment}", **early, **pass_, logits=cached + 3 * FP32 * one, buffers=gathered),
        Memory(f"the backward of {moment}", **early, **pass_, logits=cached + setup.working * one, buffers=buffers),
        Memory(f"the end of {moment}", **states, ascent=held, activations=recomputed, logits=cached, buffers=buffers),
        Memory("the ascent", **states, ascent=computing, activations=0, logits=cached, buffers=gathered),
        Memory("the descent", **states, ascent=0, activations=0, logits=0, buffers=gathered + shard),  # Adam's own temporary
    ]
    if row.regions:
        logits = cached + _distance(setup, one, row)
        candidates.append(Memory("the distance", **early, ascent=0, activations=kept, logits=logits, buffers=gathered))
    return max(candidates, key=lambda m: m.total)


def _gradients_stay(setup: Setup) -> bool:
    """Whether there are gradients at the loss: those of earlier micro-batches, or a buffer that is never given back."""
    return setup.micros > 1 or setup.engine == "zero3" or (setup.engine == "replicated" and setup.world > 1)


def _states(setup: Setup, size: Size, row: Algorithm) -> dict[str, int]:
    n, shards = size.parameters, setup.shards
    share = -(-n // shards)
    gpu = 0 if setup.offload_states else 1
    remembered = sum(isinstance(r.reference, AtWeights | Previous) for r in row.regions)
    moves = row.ascent is not None or remembered > 0
    working = {
        "replicated": 2 * n if setup.half else 0,
        "fsdp2": 0,
        "zero3": 0 if setup.offload_parameters else share * setup.working,
    }
    whole = 0 if setup.engine == "zero0" and not setup.half else n * setup.working
    return {
        "masters": gpu * FP32 * share,
        "moments": gpu * FP32 * setup.kept * share,
        "gradients": gpu * setup.gradient * share,
        "working_copy": working.get(setup.engine, whole),
        "theta_snapshot": gpu * FP32 * share if moves and not setup.separate else 0,
        "references": gpu * FP32 * share * remembered,
    }


def _activations(setup: Setup, size: Size, row: Algorithm) -> tuple[int, int]:
    """(kept for the backward pass, recomputed during it): with checkpointing the blocks' inputs, and one block at a time."""
    graphs = 1 + any(isinstance(r.reference, NoisedInput) and r.reference.differentiable for r in row.regions)
    block = size.block_input if setup.checkpointing else size.saved_block
    return graphs * (block * size.layers + size.saved_rest), size.saved_block if setup.checkpointing else 0


def _cached(setup: Setup, size: Size, row: Algorithm) -> int:
    """References at other weights keep their logits of every micro-batch until the step ends."""
    references = sum(isinstance(r.reference, AtWeights | Previous) for r in row.regions)
    return references * setup.micros * size.positions * size.classes * setup.working


def _distance(setup: Setup, one: int, row: Algorithm) -> int:
    """Current logits, their log-softmax, those of x + z, and a chunk's copies while two predictions are compared."""
    noised = any(isinstance(r.reference, NoisedInput) for r in row.regions)
    return one * (setup.working * (1 + noised) + FP32) + (7 if setup.half else 5) * min(CHUNK, FP32 * one)


def _buffers(setup: Setup, size: Size) -> tuple[int, int]:
    """(outside the backward pass, during it): gathered parameters and what is being reduced."""
    n, working = size.parameters, setup.working
    if setup.engine == "fsdp2":
        if setup.shards == 1:
            return 0, 0
        gathered = min(n, size.root + 2 * size.block) if setup.reshard else n
        kept = 0 if setup.reshard else (n - size.root) * working
        return kept, gathered * working + max(size.block, size.root) * (working + FP32)
    if setup.engine == "replicated":
        return 0, 0  # DDP's buckets are the gradients
    bucket = min(setup.bucket, n) * setup.working
    gathered = min(setup.live, n) * working if setup.engine == "zero3" else 0
    whole = n * setup.working if setup.engine == "zero1" else 0  # every parameter's gradient, until it is cut
    return gathered, gathered + bucket + whole


def setup_of(engine: str, config: dict[str, Any], **common: Any) -> Setup:
    """A Setup from an engine name (replicated, fsdp2, zero) and its config file's content; common: Setup's other fields."""
    world = common["world"]
    if engine == "replicated":
        return Setup(engine, shards=1, **common)
    if engine == "fsdp2":
        group = min(config.get("shard_size") or world, world)
        off = bool(config.get("offload"))
        return Setup(engine, shards=group, reshard=config.get("reshard_after_forward", True), offload_states=off, **common)
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    optional = {
        name: zero[key] for name, key in (("bucket", "reduce_bucket_size"), ("live", "stage3_max_live_parameters")) if key in zero
    }
    return Setup(
        f"zero{stage}", shards=world if stage else 1, offload_states=_off(zero, "offload_optimizer"),
        offload_parameters=_off(zero, "offload_param"), **optional, **common,
    )  # fmt: skip


def _off(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"

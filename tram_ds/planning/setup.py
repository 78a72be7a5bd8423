"""What of an engine and its config decides where memory and traffic go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP32 = 4


@dataclass(frozen=True)
class RunSetup:
    """What the engine's config says. shards: ranks that share one copy of the states. kept: moments
    per parameter.

    bucket, live: elements of a reduction bucket, and of gathered parameters that ZeRO-3 may keep.
    reduce_each: the gradient of every micro-batch is reduced, so that none is held unsharded.
    average: the recipe has the moving average of the weights scored instead of theta. background:
    checkpoints are written while the next step's passes run.
    """

    engine: str  # replicated, fsdp2, zero0, zero1, zero2 or zero3
    world: int
    shards: int
    half: bool
    kept: int
    micros: int
    checkpointing: bool
    reshard: bool = True
    reduce_each: bool = True
    offload_states: bool = False
    offload_parameters: bool = False
    # DeepSpeed's defaults, of reduce_bucket_size and stage3_max_live_parameters
    bucket: int = 500_000_000
    live: int = 1_000_000_000
    average: bool = False
    background: bool = False

    @property
    def working(self) -> int:
        """Bytes per element of what forward reads."""
        return 2 if self.half else FP32

    @property
    def separate(self) -> bool:
        """Masters and working copy are different memory, so moving the weights needs no copy of
        theta."""
        return self.engine in ("zero1", "zero2", "zero3") or (self.engine == "zero0" and self.half)

    @property
    def gradient(self) -> int:
        """Bytes per element of the reduced gradient."""
        return 2 if self.half and self.engine in ("zero0", "zero1") else FP32

    @property
    def keeps_gradients(self) -> bool:
        """Their memory is never given back."""
        return self.engine == "zero3" or (self.engine == "replicated" and self.world > 1)


def setup_of(engine: str, config: dict[str, Any], **common: Any) -> RunSetup:
    """Of an engine's name (replicated, fsdp2, zero) and its config file's content.

    common: the other fields.
    """
    world = common["world"]
    if engine == "replicated":
        return RunSetup(engine, shards=1, **common)
    if engine == "fsdp2":
        group = min(config.get("shard_size") or world, world)
        off = bool(config.get("offload"))
        return RunSetup(
            engine,
            shards=group,
            reshard=config.get("reshard_after_forward", True),
            reduce_each=config.get("reduce_every_micro_batch", True),
            offload_states=off,
            **common,
        )
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    optional = {
        name: zero[key]
        for name, key in (("bucket", "reduce_bucket_size"), ("live", "stage3_max_live_parameters"))
        if key in zero
    }
    return RunSetup(
        f"zero{stage}",
        shards=world if stage else 1,
        offload_states=_off(zero, "offload_optimizer"),
        offload_parameters=_off(zero, "offload_param"),
        **optional,
        **common,
    )


def _off(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"

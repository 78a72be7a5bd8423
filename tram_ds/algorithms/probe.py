"""What the perturbation really did: measured at theta + epsilon, on the working copy that the
forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tram_ds.algorithms.ascent import Gauge
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Lazy


@dataclass
class Robustness:
    """A Probe for train_step; `values` holds () tensors after the step.

    perturbation_norm: |epsilon|_2. perturbation_length: in the units of the radius (|epsilon / T|),
    where a gauge is given.
    perturbation_cosine, perturbation_projection: of the realised on the intended epsilon (1.0 where
    nothing is lost to the working copy's precision). perturbation_norm_share: of |epsilon|^2 in
    normalisation
    layers. Not `full`: only the first. One all-reduce of four numbers and one of the length.
    Epsilon is computed anew for each of them, part by part.
    """

    full: bool = True
    gauge: Gauge | None = None
    values: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, engine: Engine, epsilon: Lazy) -> None:
        intended = epsilon.square_sum(engine.device).to(engine.device)
        zero = torch.zeros_like(intended)
        sums = torch.stack([intended, *(_realised(engine, epsilon) if self.full else [zero] * 3)])
        if engine.shard_group is not None:
            dist.all_reduce(sums, group=engine.shard_group)
        intended, along, realised, norms = sums.unbind()
        self.values["perturbation_norm"] = intended.sqrt()
        if self.full:
            self.values["perturbation_cosine"] = along / (intended * realised).sqrt()
            self.values["perturbation_projection"] = along / intended
            self.values["perturbation_norm_share"] = norms / intended
        if self.full and self.gauge is not None:  # the gradient of pass 1 is still there
            self.values["perturbation_length"] = self.gauge(
                engine.params(), engine.grads(), epsilon, engine.norm
            )


def _realised(engine: Engine, epsilon: Lazy) -> list[Tensor]:
    """[<realised, epsilon>, |realised|^2, |epsilon|^2 in normalisation layers] of this rank."""
    rounded = Lazy(lambda theta: theta.rounded(engine.dtype), engine.params())
    delta = engine.working() - rounded
    names = normalisation_parameters(engine.module)
    inside = epsilon.map(lambda span, t: t if span.name in names else t[:0])
    sums = (delta.dot(epsilon), delta.square_sum(engine.device), inside.square_sum(engine.device))
    return [x.to(engine.device) for x in sums]


def normalisation_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters of LayerNorm, RMSNorm and their like."""
    layers = {name for name, m in module.named_modules() if "Norm" in type(m).__name__}
    return {name for name, _ in module.named_parameters() if name.rpartition(".")[0] in layers}

"""What the perturbation really did: measured at theta + epsilon, on the working copy that the
forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tram_ds.algorithms.ascent import EpsilonLength
from tram_ds.engines.layout import KINDS
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Lazy


@dataclass
class EpsilonProbe:
    """A Probe for train_step; `values` holds () tensors after the step.

    perturbation_norm: |epsilon|_2. perturbation_length: in the units of the radius (|epsilon / T|),
    where an epsilon_length is given.
    perturbation_cosine, perturbation_projection: of the realised on the intended epsilon (1.0 where
    nothing is lost to the working copy's precision). perturbation_norm_share, _embedding_share,
    _matrix_share: of |epsilon|^2 in normalisation layers, in embeddings (also one tied to the
    head), in the other matrices; the rest is in biases. first_grad_norm: |g|_2 of pass 1, which
    grad_norm is compared with. Not `full`: only the first and the last. One all-reduce of seven
    numbers and one of the length. Epsilon is computed anew for each of them, part by part.
    """

    full: bool = True
    epsilon_length: EpsilonLength | None = None
    values: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, engine: Engine, epsilon: Lazy) -> None:
        sums = [epsilon.square_sum(engine.device), engine.grads().square_sum(engine.device)]
        if self.full:
            sums += [*_realised(engine, epsilon), *_by_kind(engine, epsilon)]
        found = torch.stack([x.to(engine.device) for x in sums])
        if engine.shard_group is not None:
            dist.all_reduce(found, group=engine.shard_group)
        intended, first = found[:2].unbind()
        self.values["perturbation_norm"] = intended.sqrt()
        self.values["first_grad_norm"] = first.sqrt()
        if self.full:
            along, realised, *kinds = found[2:].unbind()
            self.values["perturbation_cosine"] = along / (intended * realised).sqrt()
            self.values["perturbation_projection"] = along / intended
            for kind, squares in zip(KINDS, kinds, strict=True):
                self.values[f"perturbation_{kind}_share"] = squares / intended
        if self.full and self.epsilon_length is not None:  # the gradient of pass 1 is still there
            self.values["perturbation_length"] = self.epsilon_length(
                engine.params(), engine.grads(), epsilon, engine.norm
            )


def _realised(engine: Engine, epsilon: Lazy) -> list[Tensor]:
    """[<realised, epsilon>, |realised|^2] of this rank."""
    rounded = Lazy(lambda theta: theta.rounded(engine.dtype), engine.params())
    # of two roundings: what bf16 makes of theta alone is no part of epsilon
    delta = engine.working() - rounded
    return [delta.dot(epsilon), delta.square_sum(engine.device)]


def _by_kind(engine: Engine, epsilon: Lazy) -> list[Tensor]:
    """|epsilon|^2 of this rank, for each of KINDS."""

    def inside(kind: str) -> Lazy:
        # an empty piece, not zeros: the norm passes over it
        return epsilon.map(lambda span, t: t if span.kind == kind else t[:0])

    return [inside(kind).square_sum(engine.device) for kind in KINDS]

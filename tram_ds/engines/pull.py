"""A move of the descent beside the base optimizer's, and decoupled from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tram_ds.engines.shards import Lazy, Shards


@dataclass(frozen=True)
class Pull:
    """theta += lr rate (to - theta), once a step that is taken. to: layout as params()."""

    to: Shards
    rate: float

    def share(self, groups: Sequence[Mapping[str, Any]]) -> float:
        """lr rate, in [0, 1]. groups: the optimizer's. ValueError where they have no one lr, or the
        move would go past `to`."""
        rates = {None if group["lr"] is None else float(group["lr"]) for group in groups}
        lr = rates.pop()
        if rates or lr is None:
            raise ValueError(
                "algorithm.pull is per unit of the learning rate, and the optimizer's groups have "
                "several or set their own: give all of them one lr, or use algorithm.name=kl_init"
            )
        share = lr * self.rate
        if share > 1.0:
            raise ValueError(
                f"algorithm.pull = {self.rate:g}: times the learning rate {lr:g} it is above 1, a "
                f"step past theta_0: set it to {1 / lr:g} or less"
            )
        return share

    def apply(self, theta: Shards, share: float) -> None:
        """In place, part by part; where theta is `to` already, it stays bit for bit."""
        # lerp: x + share (to - x) is x itself where to is x, which (1 - share) x + share to is not
        theta.copy_(Lazy(lambda x, to: x.lerp(to, share), theta, self.to))

"""Randomness as a pure function of (seed, step, purpose, global micro-batch index).

No generator state is ever saved: a resumed run, and a run at another world size, draws the same
dropout masks and the same noise for the same micro-batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRandomness:
    """The random draws of one step on one rank; `first` is the global index of this rank's first
    micro-batch."""

    seed: int
    step: int
    first: int = 0

    def key(self, purpose: str, index: int) -> int:
        """A 63-bit generator seed for micro-batch `index` (counted on this rank) and `purpose`
        (pass_1, noise, ...)."""
        text = f"{self.seed}/{self.step}/{purpose}/{self.first + index}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def seed_masks(self, purpose: str, index: int) -> None:
        """Seeds torch's default generators: the dropout masks of the forward pass that follows."""
        torch.manual_seed(self.key(purpose, index))

    def noise(self, like: Tensor, index: int, sigma: float, kind: str) -> Tensor:
        """z with the shape, device and dtype of `like`: N(0, sigma^2) or uniform on (-sigma,
        sigma), drawn in fp32.

        Drawn on the CPU generator for CPU tensors and on the device otherwise: equal runs need
        equal device types.
        """
        generator = torch.Generator(device=like.device).manual_seed(self.key("noise", index))
        z = torch.empty(like.shape, device=like.device, dtype=torch.float32)
        z = (
            z.normal_(0.0, sigma, generator=generator)
            if kind == "normal"
            else z.uniform_(-sigma, sigma, generator=generator)
        )
        return z.to(like.dtype)

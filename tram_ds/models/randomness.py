"""Randomness as a pure function of (seed, step, purpose, global micro-batch index).

No generator state is ever saved: a resumed run, and a run at another world size, draws the same
dropout masks and the same noise for the same micro-batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

# elements that one generator draws of a parameter: a cut piece throws away two parts of them
BLOCK = {"cpu": 1 << 16, "cuda": 1 << 20}


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
        return _key(f"{self.seed}/{self.step}/{purpose}/{self.first + index}")

    def seed_masks(self, purpose: str, index: int) -> None:
        """Seeds torch's default generators: the dropout masks of the forward pass that follows."""
        torch.manual_seed(self.key(purpose, index))

    def noise(self, like: Tensor, index: int, sigma: float, kind: str) -> Tensor:
        """z with the shape, device and dtype of `like`: N(0, sigma^2) or uniform on (-sigma,
        sigma), drawn in fp32.

        Drawn on the CPU generator for CPU tensors and on the device otherwise: equal runs need
        equal device types.
        """
        # of its own: torch's default one stands at this pass's dropout masks
        generator = torch.Generator(device=like.device).manual_seed(self.key("noise", index))
        z = torch.empty(like.shape, device=like.device, dtype=torch.float32)
        z = (
            z.normal_(0.0, sigma, generator=generator)
            if kind == "normal"
            else z.uniform_(-sigma, sigma, generator=generator)
        )
        return z.to(like.dtype)

    def weights(self, name: str, start: int, like: Tensor) -> Tensor:
        """N(0, 1) for the elements from `start` on of the flattened parameter `name`, as many as
        the flat `like` has, on its device, drawn in fp32: of an element, the same whatever piece it
        is asked for with, so on every rank, engine and world size. Equal runs need equal device
        types."""
        block, stop = BLOCK.get(like.device.type, BLOCK["cuda"]), start + len(like)
        z = torch.empty(len(like), device=like.device)
        for index in range(start // block, -(-stop // block)):
            text = f"{self.seed}/{self.step}/weights/{name}/{index}"
            generator = torch.Generator(device=like.device).manual_seed(_key(text))
            # whole: what a generator gives depends on how much it is asked for
            drawn = torch.randn(block, device=like.device, generator=generator)
            first, last = max(start, index * block), min(stop, (index + 1) * block)
            z[first - start : last - start] = drawn[first - index * block : last - index * block]
        return z.to(like.dtype)


def _key(text: str) -> int:
    """A 63-bit generator seed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

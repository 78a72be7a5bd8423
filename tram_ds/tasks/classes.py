"""What the tasks of classification share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def row_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 3) fp64: loss, 1, and whether it is right, of every example."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none").double()
    right = (logits.argmax(-1) == labels).double()
    return torch.stack([losses, torch.ones_like(losses), right], 1)

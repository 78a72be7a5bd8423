"""Distances between two predictions: (reference (N, C), current (N, C)) logits -> () summed over N,
in fp32 or better.

The caller divides by the number of positions of the global batch, so d is a mean (Eq. 4-5). Rows
are processed in chunks so that no second (N, C) fp32 copy exists. Gradients flow into whichever
argument carries a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Distance = Callable[[Tensor, Tensor], Tensor]

# 64 MiB of fp32 a chunk: large enough to keep a GPU busy, small beside a model
CHUNK_ELEMENTS = 1 << 24


def _wide(logits: Tensor) -> Tensor:
    """fp32 for half precision, unchanged for fp32 and fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _kl(target: Tensor, estimate: Tensor) -> Tensor:
    """sum over rows of KL(target || estimate), from logits."""
    log_p, log_q = target.log_softmax(-1), estimate.log_softmax(-1)
    if log_p.requires_grad or log_q.requires_grad:
        return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    difference = log_p - log_q
    return log_p.exp_().mul_(difference).sum()  # the same, a third faster: d of TRAM needs no graph


def kl_forward(reference: Tensor, current: Tensor) -> Tensor:
    """KL(reference || current), Eq. 4-5: the prior distribution is the target."""
    return _kl(reference, current)


def kl_reverse(reference: Tensor, current: Tensor) -> Tensor:
    """KL(current || reference)."""
    return _kl(current, reference)


def kl_symmetric(reference: Tensor, current: Tensor) -> Tensor:
    """KL(reference || current) + KL(current || reference): the sum, not the half sum, as in R3F."""
    return _kl(reference, current) + _kl(current, reference)


def l2(reference: Tensor, current: Tensor) -> Tensor:
    """sum over rows of ||reference - current||_2. A row without difference has gradient 0, not
    NaN."""
    squares = (reference - current).square().sum(-1)
    # two wheres: sqrt has derivative inf at 0, which the outer one alone would multiply by 0
    moved = squares > 0
    return torch.where(moved, torch.where(moved, squares, 1.0).sqrt(), 0.0).sum()


def renyi(reference: Tensor, current: Tensor, *, order: float = 0.5) -> Tensor:
    """sum over rows of D_a(reference || current) = log(sum_c p^a q^(1-a)) / (a - 1); a -> 1 is the
    forward KL."""
    log_p, log_q = reference.log_softmax(-1), current.log_softmax(-1)
    # p^a q^(1-a) from logarithms: powers of small probabilities underflow
    return (torch.logsumexp(order * log_p + (1.0 - order) * log_q, -1) / (order - 1.0)).sum()


_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # bandwidths b; the kernel sums over them
_KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "imq2": lambda squares, b: (b * b + squares).rsqrt(),
    "imq": lambda squares, b: b * b / (b * b + squares),
    "imq3": lambda squares, b: (b * b + squares).pow(-1.5),
    "rbf": lambda squares, b: torch.exp(-squares / (2.0 * b * b)),
}


def mmd(reference: Tensor, current: Tensor, *, kernel: str = "imq2") -> Tensor:
    """N times the biased squared maximum mean discrepancy (Gretton et al. 2012) between the two
    samples of N rows.

    imq2 is the inverse multiquadratic kernel k(x, y) = sum_b (b^2 + |x - y|^2)^(-1/2), diagonal
    included. It compares samples, not rows, so it is not additive over micro-batches: `mmd_scope:
    global` gathers the whole batch first.
    """
    rows = torch.cat([reference, current])
    # by differences: |x|^2 + |y|^2 - 2 x y would cancel where two rows are near
    squares = (rows[:, None, :] - rows[None, :, :]).square().sum(-1)
    gram = sum((_KERNELS[kernel](squares, b) for b in _SCALES), torch.zeros_like(squares))
    sign = torch.cat([rows.new_ones(len(reference)), -rows.new_ones(len(current))])
    # a square, but the sum of positive and negative terms may round to below 0
    return (sign @ gram @ sign).clamp(min=0.0) / max(len(reference), 1)


DISTANCES: dict[str, Distance] = {
    "kl_forward": kl_forward,
    "kl_reverse": kl_reverse,
    "kl_symmetric": kl_symmetric,
    "mmd": mmd,
    "l2": l2,
    "renyi": renyi,
}
NOT_ADDITIVE = {"mmd"}  # compares samples: cannot be cut into chunks or micro-batches


def distance(
    name: str,
    *,
    on: str = "logits",
    temperature: float = 1.0,
    kernel: str = "imq2",
    order: float = 0.5,
) -> Distance:
    """A row of DISTANCES with its options bound, widened to fp32 and cut into chunks of rows where
    it is additive.

    on: `probabilities` compares softmax outputs instead of logits (mmd and l2 only).
    temperature: T divides both logits and the distance is multiplied by T^2 (Hinton's scaling; SAF
    and MESA use T = 5).
    """
    options = {"mmd": {"kernel": kernel}, "renyi": {"order": order}}.get(name, {})
    base = partial(DISTANCES[name], **options)

    def measure(reference: Tensor, current: Tensor) -> Tensor:
        # wide first: log_softmax and the sums over C, in bf16, would round a small d away
        reference, current = _wide(reference) / temperature, _wide(current) / temperature
        if on == "probabilities":
            reference, current = reference.softmax(-1), current.softmax(-1)
        return base(reference, current) * temperature**2

    return measure if name in NOT_ADDITIVE else partial(_chunked, measure)


def _chunked(measure: Distance, reference: Tensor, current: Tensor) -> Tensor:
    """Sums `measure` over chunks of rows; with a graph each chunk is recomputed in the backward
    pass instead of kept."""
    rows = max(1, CHUNK_ELEMENTS // max(1, current.shape[-1]))
    if len(current) <= rows:
        return measure(reference, current)
    # without a graph nothing is kept anyway, and checkpoint would only cost
    graph = torch.is_grad_enabled() and (reference.requires_grad or current.requires_grad)
    step = partial(checkpoint, measure, use_reentrant=False) if graph else measure
    parts = [step(r, c) for r, c in zip(reference.split(rows), current.split(rows), strict=True)]
    return torch.stack(parts).sum()

"""Linear CKA (Kornblith et al. 2019; Eq. 12): how much of the pre-trained representation a
fine-tuned model kept.

    CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),   X, Y (n, d): one row per example

X and Y are the last hidden states of the base model, before any head. Kornblith et al. centre the
columns and so does this;
Eq. 12 of the paper does not (`centred: false`). Pooling is not published: the first token, as
classifiers of the BERT family read it. In a causal language model the first token sees nothing but
itself, so language modeling averages over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tram_ds.engines.shards import Shards
from tram_ds.runtime.checked import Section
from tram_ds.surface.subject import Subject


class Options(Section):
    """Settings of the measurement."""

    pooling: Literal["auto", "first", "mean"] = "auto"
    """The first token's state, the mean over tokens that are not padding, or the one that fits the
    task."""
    centred: bool = True
    """Subtract each column's mean over the examples; false is Eq. 12 to the letter."""


def measure(
    subject: Subject, pretrained: Shards, options: Options, classification: bool
) -> dict[str, Any]:
    """{value, rows} and the options: the engine's weights against `pretrained`. Collective, two
    forward passes over the rows."""
    pooling = (
        options.pooling if options.pooling != "auto" else ("first" if classification else "mean")
    )
    x, y = features(subject, None, pooling), features(subject, pretrained, pooling)
    settings = options.model_dump() | {"pooling": pooling}
    return {"value": linear_cka(x, y, options.centred), "rows": subject.rows, **settings}


def linear_cka(x: Tensor, y: Tensor, centred: bool = True) -> float:
    """CKA of x (n, d) and y (n, e), row by row of the same examples, in float64. ValueError where
    one does not vary."""
    if len(x) != len(y):
        raise ValueError(f"CKA compares the same examples: {len(x)} rows against {len(y)}")
    x, y = x.double(), y.double()
    size = torch.stack([x.norm(), y.norm()])
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    # relative to the size before centring: what is left of equal rows is rounding, not 0
    if bool((torch.stack([x.norm(), y.norm()]) <= 1e-12 * size).any()):
        raise ValueError(
            f"CKA of {len(x)} examples: all have the same representation; give more rows, or "
            "cka.pooling=mean where the model "
            "is causal and its first token sees only itself"
        )
    # of d x d matrices, not n x n: n is the number of examples
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def features(subject: Subject, at: Shards | None, pooling: str) -> Tensor:
    """(rows, d) float64 on the CPU, the same on every rank: the representation of each row at
    weights `at`, in eval mode.

    Collective: every rank fills the rows it ran, one sum over the data-parallel ranks joins them.
    """
    found: Tensor | None = None
    share = subject.share(0, subject.rows)
    with torch.no_grad(), subject.at(at), last_hidden_state(subject.engine.module) as seen:
        for index, (rows, weight) in enumerate(share):
            batch = subject.batch(rows)
            subject.run(len(share))(index, batch, masks="analysis", train=False)
            pooled = pool(seen.pop(), batch, pooling)
            if found is None:
                found = torch.zeros(
                    subject.rows, pooled.shape[1], dtype=torch.float64, device=subject.engine.device
                )
            # one of weight 0 repeats a row that another rank has: the sum would count it twice
            if weight:
                found[rows.start : rows.stop] = pooled
    assert found is not None, "every rank runs at least one micro-batch"
    return subject.engine.data_sum(found).cpu()


def pool(states: Tensor, batch: Any, pooling: str) -> Tensor:
    """(B, d) float64 from the states (B, T, d) and the batch, whose attention_mask (B, T), if any,
    marks padding."""
    states = states.double()
    if pooling == "first":
        return states[:, 0]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return states.mean(1)
    weight = mask.to(states.device, torch.float64).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1)


@contextmanager
def last_hidden_state(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects, forward pass by forward pass, what the base model of a Hugging Face model hands to
    its head: (B, T, d)."""
    base = getattr(module, "base_model", module)
    if base is module:
        raise ValueError(
            f"{type(module).__name__} has no base model below its head: CKA needs a Hugging Face "
            "model with a head"
        )
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        seen.append(output[0] if states is None else states)

    handle = base.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()

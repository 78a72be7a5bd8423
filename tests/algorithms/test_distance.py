"""Distances against their definitions, written out in float64."""

from __future__ import annotations

import pytest
import torch

from tram_ds.algorithms import distance as module
from tram_ds.algorithms.distance import DISTANCES, distance

N, C = 6, 5


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, C, generator=g, dtype=torch.float64), torch.randn(
        N, C, generator=g, dtype=torch.float64
    )


def written_out(name: str, r: torch.Tensor, c: torch.Tensor) -> float:
    p, q = r.exp() / r.exp().sum(-1, keepdim=True), c.exp() / c.exp().sum(-1, keepdim=True)
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    if name == "mmd":

        def kernel(x, y):
            widths = (0.1, 0.2, 0.5, 1, 2, 5, 10)
            return sum((b * b + ((x - y) ** 2).sum()) ** -0.5 for b in widths)

        def mean(xs, ys):
            return sum(kernel(x, y) for x in xs for y in ys) / (len(xs) * len(ys))

        return float(N * (mean(r, r) + mean(c, c) - 2 * mean(r, c)))
    return {
        "kl_forward": float(forward),
        "kl_reverse": float(reverse),
        "kl_symmetric": float(forward + reverse),
        "l2": float(((r - c) ** 2).sum(-1).sqrt().sum()),
        "renyi": float(((p.sqrt() * q.sqrt()).sum(-1).log() / -0.5).sum()),
    }[name]


@pytest.mark.parametrize("name", DISTANCES)
def test_equals_its_definition(name: str) -> None:
    r, c = pair()
    assert float(distance(name)(r, c)) == pytest.approx(written_out(name, r, c), rel=1e-10)


@pytest.mark.parametrize("name", DISTANCES)
def test_is_zero_on_itself_with_a_finite_gradient(name: str) -> None:
    r, _ = pair()
    current = r.clone().requires_grad_()
    value = distance(name)(r, current)
    value.backward()
    assert float(value) == pytest.approx(0.0, abs=1e-12)
    assert current.grad is not None and bool(torch.isfinite(current.grad).all())


@pytest.mark.parametrize("name", [n for n in DISTANCES if n != "mmd"])
def test_chunks_change_neither_value_nor_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    r, c = pair()
    whole = c.clone().requires_grad_()
    a = distance(name)(r, whole)
    a.backward()
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * C)
    cut = c.clone().requires_grad_()
    b = distance(name)(r, cut)
    b.backward()
    assert float(a) == pytest.approx(float(b), rel=1e-12)
    assert torch.allclose(whole.grad, cut.grad, rtol=1e-12)  # type: ignore[arg-type]


def test_renyi_of_order_near_one_is_the_forward_kl() -> None:
    r, c = pair()
    assert float(distance("renyi", order=1 - 1e-6)(r, c)) == pytest.approx(
        written_out("kl_forward", r, c), rel=1e-4
    )


def test_temperature_and_probabilities() -> None:
    """T divides the logits and multiplies by T^2; on probabilities l2 compares softmax outputs."""
    r, c = pair()
    assert float(distance("kl_forward", temperature=2.0)(r, c)) == pytest.approx(
        4 * written_out("kl_forward", r / 2, c / 2)
    )
    want = float((r.softmax(-1) - c.softmax(-1)).norm(dim=-1).sum())
    assert float(distance("l2", on="probabilities")(r, c)) == pytest.approx(want)


def test_half_precision_logits_are_measured_in_fp32() -> None:
    r, c = (x.float() for x in pair())
    half = distance("kl_forward")(r.bfloat16(), c.bfloat16())
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(
        written_out("kl_forward", r.bfloat16().double(), c.bfloat16().double()), rel=1e-5
    )

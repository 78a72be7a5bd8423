"""The start-up self-check finds each of the three broken promises, and passes a correct engine."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.parity import problem
from tram_ds.algorithms.self_check import self_check
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.engines.digest import digest
from tram_ds.engines.shards import Lazy, Shards, Span
from tram_ds.runtime.exits import NumericError


def stepper(name: str = "tram_prev", dropout: float = 0.1, **options: Any) -> Stepper:
    model = problem.model(dropout)
    return wrap(model, problem.optimizer(name, lr=0.1)(model.parameters()), name, **options)


BATCHES = problem.global_batches(1, 2)[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_correct_engine_passes_and_is_left_as_it_was(name: str) -> None:
    built = stepper(name)
    before = [p.detach().clone() for p in built.engine.module.parameters()]
    self_check(built, BATCHES, problem.forward)
    assert all(
        torch.equal(a, b) for a, b in zip(before, built.engine.module.parameters(), strict=True)
    )
    assert all(p.grad is None for p in built.engine.module.parameters()) and built.steps == 0


def test_a_perturbation_that_is_not_published() -> None:
    built: Any = stepper()

    @contextmanager
    def nowhere(to: Any):
        yield

    built.engine.moved = nowhere
    with pytest.raises(NumericError, match="loss did not move"):
        self_check(built, BATCHES, problem.forward)


def test_a_norm_that_is_wrong() -> None:
    built: Any = stepper()
    norm, calls = built.engine.norm, iter(range(100))
    built.engine.norm = lambda x: norm(x) * (2.0 if next(calls) == 0 else 1.0)
    with pytest.raises(NumericError) as raised:
        self_check(built, BATCHES, problem.forward)
    length, radius = re.findall(r"is (\S+) where the radius is (\S+)", str(raised.value))[0]
    assert float(length) == pytest.approx(float(radius) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "dropout", "options"),
    [
        ("tram_x", 0.0, {"radius_scale": 30.0}),
        ("tram_prev", 0.1, {"radius_scale": 30.0}),
        ("tram_init", 0.1, {"radius_max": 1e-3}),
        ("asam", 0.0, {"rho": 0.25}),
    ],
)
def test_it_climbs_by_the_radius_of_the_step_that_follows(
    name: str, dropout: float, options: dict[str, Any]
) -> None:
    built: Any = stepper(name, dropout, **options)
    norm, calls = built.engine.norm, iter(range(100))
    built.engine.norm = lambda x: norm(x) * (2.0 if next(calls) == 0 else 1.0)
    with pytest.raises(NumericError) as raised:
        self_check(built, BATCHES, problem.forward)
    built.engine.norm = norm
    radius = re.findall(r"where the radius is (\S+)", str(raised.value))[0]
    report = built.step(BATCHES, problem.forward)
    assert float(radius) == pytest.approx(float(report.radius), rel=1e-5)


def test_where_the_distance_is_0_it_climbs_by_half() -> None:
    built: Any = stepper("tram_prev", 0.0)
    norm, calls = built.engine.norm, iter(range(100))
    built.engine.norm = lambda x: norm(x) * (2.0 if next(calls) == 0 else 1.0)
    with pytest.raises(NumericError, match=r"is 0.25 where the radius is 0.5"):
        self_check(built, BATCHES, problem.forward)


def test_a_radius_that_moves_nothing_is_no_broken_engine() -> None:
    with pytest.warns(UserWarning, match=r"self-check: at the radius of this batch, \d.*e-"):
        self_check(stepper(radius_scale=1e-9), BATCHES, problem.forward)


def test_it_copies_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the snapshot that a step takes as well where the masters are the working copy."""
    built, copies = stepper(), []
    clone, realise = Shards.clone, Lazy.realise
    monkeypatch.setattr(Shards, "clone", lambda x: copies.append("clone") or clone(x))
    monkeypatch.setattr(Lazy, "realise", lambda x: copies.append("realise") or realise(x))
    self_check(built, BATCHES, problem.forward)
    assert copies == ["clone"]


def test_weights_that_do_not_come_back() -> None:
    built: Any = stepper()
    moved = built.engine.moved

    @contextmanager
    def drifting(to: Any):
        with moved(to):
            yield
        next(built.engine.module.parameters()).data[0, 0] += 1e-7

    built.engine.moved = drifting
    with pytest.raises(NumericError, match="bit for bit"):
        self_check(built, BATCHES, problem.forward)


def test_a_digest_is_of_every_bit_and_its_place() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(1_200_000, generator=g)  # more than one part, and more than one split
    layout = (Span("a", 0, 1_000_000, (1_000_000,)), Span("b", 0, 200_000, (200_000,)))

    def of(x: torch.Tensor) -> list[int]:
        return digest(Shards([x[:1_000_000], x[1_000_000:]], layout)).tolist()

    whole = of(values)
    assert of(values.clone()) == whole
    for place in (0, 600_000, 1_199_999):
        changed = values.clone()
        changed.view(torch.int32)[place] ^= 1  # the last bit
        assert all(a != b for a, b in zip(of(changed), whole, strict=True))
    swapped = values.clone()
    swapped[[3, 1_100_000]] = values[[1_100_000, 3]]
    assert of(swapped)[0] == whole[0] and of(swapped)[1] != whole[1]
    assert of(-torch.zeros(1_200_000)) != of(torch.zeros(1_200_000))
    half = Shards([values[:8].bfloat16()], (Span("a", 0, 8, (8,)),))
    assert digest(half).tolist() == digest(half.clone()).tolist()

"""What a step did, by hand where that is possible; and what is said of rows that do nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.parity import problem
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.effect import Effect, keys, measure
from tram_ds.algorithms.probe import EpsilonProbe
from tram_ds.algorithms.said import dropout_is_active
from tram_ds.algorithms.stepper import Stepper, wrap
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.engines.layout import kinds_of

STEPS = problem.global_batches(3, 2)


def stepper(name: str, dropout: float = 0.0, **options: Any) -> Stepper:
    model = problem.model(dropout)
    return wrap(model, problem.optimizer(name, lr=0.1)(model.parameters()), name, **options)


def a_line(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    """sum over x of w^2 x / 2 of a one-weight model: its gradient is w x, summed."""
    y = model(x)
    return (y.square() / 2).sum(), len(x), y


def test_sam_on_a_parabola_by_hand() -> None:
    """L = w^2 / 2 at w = 2: g = 2, epsilon = rho = .5, g' = 2.5: |g' - g| / |g| = 1/4, and the loss
    goes from 2 to 3.125."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    built = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "sam", rho=0.5)
    found = measure(built, [torch.ones(1, 1)], a_line)
    assert found.change == pytest.approx(0.25) and found.cosine == pytest.approx(1.0)
    assert (found.loss, found.loss_gap) == pytest.approx((2.0, 1.125))
    assert (found.norm, found.radius, found.masks) == pytest.approx((0.5, 0.5, 0.0))
    assert found.step == 1 and built.steps == 0 and model.weight.item() == 2.0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_that_was_looked_at_is_the_step_it_would_have_been(name: str) -> None:
    """Bit for bit: weights, references, counters, the caller's randomness."""
    ends = []
    for looked in (False, True):
        built = stepper(name, 0.1, **problem.OPTIONS.get(name, {}))
        torch.manual_seed(3)
        for batches in STEPS:
            if looked:
                measure(built, batches, problem.forward, problem.counts)
            built.step(batches, problem.forward, problem.counts)
        ends.append([*built.engine.params().clone(), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_but_base_and_l2sp_changes_the_gradient(name: str) -> None:
    """l2sp moves the weights beside the gradient's step."""
    built = stepper(name, 0.1, **problem.OPTIONS.get(name, {}))
    built.step(STEPS[0], problem.forward, problem.counts)
    found = measure(built, STEPS[1], problem.forward, problem.counts)
    assert found.masks > 0.1
    if name in ("base", "l2sp"):
        assert (found.change, found.norm, found.loss_gap) == (0.0, 0.0, 0.0) and not found.acts
    else:
        assert found.change > 1e-3 and found.acts and found.cosine < 1.0
        assert (found.norm > 0.0) == built.algorithm.perturbs


def test_a_penalty_twice_as_heavy_changes_the_gradient_twice_as_much() -> None:
    changes = []
    for weight in (0.5, 1.0):
        built = stepper("r3f", weight=weight)
        changes.append(measure(built, STEPS[0], problem.forward).change)
    assert changes[1] == pytest.approx(2 * changes[0], rel=1e-4) and changes[0] > 1e-3


@pytest.mark.parametrize(
    ("change", "gap", "masks", "verdict"),
    [
        (1.1e-3, 0.0, 0.0, "acts"),
        (0.9e-3, 0.0, 0.0, "does not act"),
        (0.9e-3, 0.0, 0.5, "acts"),
        (1.1e-3, 0.0, 1.2, "does not act"),
        (0.5, 1.0, 0.0, "acts"),
        (0.5, 1.01, 0.0, "too far"),
    ],
)
def test_the_verdict_is_relative_to_the_masks_and_to_the_loss(
    change: float, gap: float, masks: float, verdict: str
) -> None:
    found = Effect(3, 2.0, gap, 0.0, 0.1, 0.1, change, 0.9, masks)
    assert found.verdict == verdict
    assert ("base optimizer" in found.words("sam")) == (verdict == "does not act")


def test_the_keys_that_set_the_size() -> None:
    assert keys(algorithm("base")) == ()
    assert keys(algorithm("asam")) == ("rho",)
    assert keys(algorithm("asam_trpo")) == ("rho", "weight")
    assert keys(algorithm("tram_x")) == ("radius_scale", "sigma")
    assert keys(algorithm("tram_x", radius="relative")) == ("rho", "sigma")
    assert keys(algorithm("tram_init", radius_scale="auto")) == ("rho",)


NO_DROPOUT = "no active dropout"


def said(name: str, dropout: float, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = stepper(name, dropout, **options)
        for batches in STEPS[:2]:
            built.step(batches, problem.forward, problem.counts)
    return [text for w in caught if NO_DROPOUT in (text := str(w.message))]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tram_prev", "the radius of tram_prev is the last step's movement alone"),
        ("tram_init", "the radius of tram_init is the movement since the start alone"),
        ("trpo", "the penalty of trpo is the last step's movement alone"),
        ("asam_mesa", "the distance of the weights from their average alone"),
    ],
)
def test_a_reference_of_earlier_weights_needs_dropout_and_says_so_once(
    name: str, what: str
) -> None:
    (text,) = said(name, 0.0)
    assert what in text and "algorithm." in text
    assert said(name, 0.1) == []


@pytest.mark.parametrize("name", ("base", "asam", "tram_x", "r3f", "tram_fisher"))
def test_other_rows_do_not_need_it(name: str) -> None:
    assert said(name, 0.0) == []


def test_a_student_in_eval_mode_has_no_dropout_either() -> None:
    assert len(said("tram_prev", 0.1, student_mode="eval")) == 1


def test_dropout_is_found_in_layers_and_in_numbers_and_only_in_train_mode() -> None:
    assert not dropout_is_active(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
    layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    assert dropout_is_active(layer) and not dropout_is_active(layer.eval())
    assert dropout_is_active(nn.MultiheadAttention(4, 2, dropout=0.1))
    assert not dropout_is_active(nn.MultiheadAttention(4, 2))


def test_the_shares_of_epsilon_by_kind_of_layer() -> None:
    """A tied head is an embedding; what is left of 1 is in biases."""
    kinds = kinds_of(problem.model())
    assert kinds["transformer.wte.weight"] == "embedding"
    assert kinds["transformer.h.0.ln_1.bias"] == "norm"
    assert kinds["transformer.h.0.attn.c_attn.weight"] == "matrix"
    assert "transformer.h.0.attn.c_attn.bias" not in kinds
    for name, total in (("all", None), ("matrices", 1.0), ("norms", 0.0)):
        built, probe = stepper("asam", adaptive_filter=name), EpsilonProbe()
        seen: dict[str, float] = {}

        def watch(engine: Any, epsilon: Any, probe: Any = probe, seen: Any = seen) -> None:
            probe(engine, epsilon)
            whole, inside = epsilon.realise(), dict.fromkeys(("norm", "embedding", "matrix"), 0.0)
            for span, piece in zip(whole.layout, whole, strict=True):
                if span.name in kinds:
                    inside[kinds[span.name]] += float(piece.double().square().sum())
            squares = float(whole.square_sum())
            seen |= {f"perturbation_{k}_share": v / squares for k, v in inside.items()}
            g = engine.grads().realise()
            seen["first_grad_norm"] = float(engine.norm(g))

        report = built.step(STEPS[0], problem.forward, probe=watch)
        got = {key: float(probe.values[key]) for key in seen}
        assert got == pytest.approx(seen, rel=1e-5)
        if total is not None:
            assert got["perturbation_norm_share"] == pytest.approx(1.0 - total)
            assert got["perturbation_embedding_share"] + got["perturbation_matrix_share"] == (
                pytest.approx(total)
            )
        assert float(report.grad_norm) != pytest.approx(got["first_grad_norm"])


def test_the_change_of_the_gradients_norm_is_recorded() -> None:
    from tram_ds.training.loop import step_record

    built, probe = stepper("sam"), EpsilonProbe(full=False)
    report = built.step(STEPS[0], problem.forward, probe=probe)
    record = step_record(1, report, 1.0, probe.values)
    want = record["grad_norm"] / record["first_grad_norm"] - 1.0
    assert record["grad_norm_change"] == pytest.approx(want) and abs(want) > 1e-4

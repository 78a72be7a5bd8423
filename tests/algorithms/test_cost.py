"""The cost of a step, read off the algorithm's row, against the passes of the paper and FLOP
counted in real steps."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.parity import problem
from tram_ds import wrap
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.cost import cost, cost_of
from tram_ds.algorithms.table import ALGORITHMS, reads

# the paper's Table 2, and the baselines; forward / backward. R3F's loss is differentiated through
# both of its branches
PASSES = {
    "base": (1, 1),
    "sam": (2, 2),
    "asam": (2, 2),
    "fsam": (2, 2),
    "functional_sam": (2, 2),
    "trpo": (2, 1),
    "r3f": (2, 2),
    "mesa": (2, 1),
    "kl_init": (2, 1),
    "l2sp": (1, 1),
    "msam": (1, 1),
    "rwp": (1, 1),
    "asam_trpo": (3, 2),
    "asam_r3f": (4, 4),
    "asam_mesa": (3, 2),
    "tram_prev": (3, 2),
    "tram_init": (3, 2),
    "tram_x": (3, 2),
    "tram_fisher": (2, 2),
}


def test_every_algorithm_has_its_passes() -> None:
    found = {name: cost({"name": name}) for name in ALGORITHMS}
    assert {name: (c.forward, c.backward) for name, c in found.items()} == PASSES
    assert (found["base"].units, found["sam"].units, found["tram_prev"].units) == (3, 6, 7)
    assert found["tram_x"].relative == pytest.approx(7 / 3)


def test_options_that_cost_are_counted() -> None:
    assert cost({"name": "tram_fisher", "fisher": "alg2"}).units == 9
    assert cost({"name": "tram_prev", "student_mode": "eval", "kl_norm": "mean"}).units == 8
    assert cost({"name": "asam_r3f", "penalty_passes": "ascent"}).units == 9
    assert cost({"name": "r3f", "reference_gradient": "current"}).units == 4
    assert cost({"name": "tram_x", "perturb_every": 4}).units == (7 + 3 * 3) / 4
    later = {"name": "asam_mesa", "perturb_every": 2}
    assert cost({**later, "penalty_start": 9}) == cost(later)
    with pytest.raises(ValueError, match="tram_pref"):
        cost({"name": "tram_pref"})


def test_a_step_without_its_ascent_costs_what_is_left() -> None:
    left = {
        "tram_prev": "base",
        "asam": "base",
        "tram_fisher": "base",
        "asam_trpo": "trpo",
        "asam_r3f": "r3f",
    }
    for name, rest in left.items():
        row = algorithm(name, perturb_every=2)
        assert (cost_of(row.at(0)), cost_of(row.at(1))) == (
            cost({"name": name}),
            cost({"name": rest}),
        ), name
    alg2 = algorithm("tram_fisher", fisher="alg2", perturb_every=2)
    assert (cost_of(alg2.at(0)).units, cost_of(alg2.at(1)).units) == (9, 3)


@pytest.mark.parametrize("name", ("trpo", "mesa", "kl_init", "r3f", "asam_mesa", "asam_trpo"))
def test_nothing_is_predicted_before_the_penalty_starts(name: str) -> None:
    """From then on, the row's own passes."""
    torch.manual_seed(0)
    model, calls = torch.nn.Linear(4, 3), []
    options = {"noise_site": model} if "noise_site" in reads(name) else {}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    stepper = wrap(model, sgd, algorithm=name, penalty_start=2, **options)

    def forward(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        calls.append(1)
        logits = model(x)
        return logits.square().sum(), len(x), logits

    counts = []
    for _ in range(4):
        calls.clear()
        stepper.step([torch.randn(2, 4)], forward)
        counts.append(len(calls))
    plain, whole = 1 + name.startswith("asam"), PASSES[name][0]
    assert counts == [plain, plain, whole, whole]


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_flop_of_a_real_step_are_those(name: str) -> None:
    """A chain of equal layers: all but the first take part in everything, so the share of the first
    bounds the error."""
    torch.manual_seed(0)
    layers = 24
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16, bias=False) for _ in range(layers)])
    options = {"noise_site": model[0]} if "noise_site" in reads(name) else {}
    stepper = wrap(
        model, problem.optimizer(name, 1e-3)(model.parameters()), algorithm=name, **options
    )

    def forward(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        logits = model(x)
        return logits.square().sum(), len(x), logits

    batches = [torch.randn(8, 16)]
    stepper.step(batches, forward)
    with FlopCounterMode(display=False) as counted:
        stepper.step(batches, forward)
    unit = layers * 8 * 16 * 16 * 2
    assert counted.get_total_flops() / unit == pytest.approx(cost({"name": name}).units, rel=0.05)

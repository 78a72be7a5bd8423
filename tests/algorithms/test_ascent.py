"""Ascent directions in closed form, and where a division by zero would lurk."""

from __future__ import annotations

import math

import pytest
import torch

from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.distance import kl_forward
from tram_ds.algorithms.options import Climb
from tram_ds.algorithms.radius import Scaled
from tram_ds.algorithms.reference import Previous
from tram_ds.algorithms.table import ALGORITHMS, reads
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.engines.shards import Shards, Span

LAYOUT = (Span("a.weight", 0, 3, (1, 3)), Span("a.bias", 0, 2, (2,)))
THETA = Shards([torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 3.0])], LAYOUT)
G = Shards([torch.tensor([0.1, 0.2, -0.4]), torch.tensor([0.3, -0.1])], LAYOUT)
CLIMBING = [name for name, row in ALGORITHMS.items() if Climb in row]


def norm(x: Shards) -> torch.Tensor:
    return x.square_sum().sqrt()


def flat(x: Shards) -> torch.Tensor:
    return torch.cat(list(x)).double()


def test_equations_written_out() -> None:
    """Eq. 2 with T = 1 and T = |theta| (Eq. 7), and Eq. 8 with F^-1 = 1 / (1 + eta g^2)."""
    theta, g = flat(THETA), flat(G)
    r = 1 / (1 + 2.0 * g**2)
    want = {
        "sam": 0.7 * g / g.norm(),
        "asam": 0.7 * theta**2 * g / (theta * g).norm(),
        "fsam": 0.7 * r * g / (r * g**2).sum().sqrt(),
    }
    for name, epsilon in want.items():
        options = {"rho": 0.7, "eta": 2.0} if name == "fsam" else {"rho": 0.7}
        ascent = algorithm(name, **options).ascent
        assert ascent is not None
        assert torch.allclose(flat(ascent(THETA, G, 0.7, norm)), epsilon, rtol=1e-6), name


@pytest.mark.parametrize("name", CLIMBING)
def test_epsilon_climbs_and_is_as_long_as_the_radius(name: str) -> None:
    row = algorithm(name, **({"eta": 2.0} if "eta" in reads(name) else {}))
    assert row.ascent is not None and row.epsilon_length is not None
    epsilon = row.ascent(THETA, G, 0.3, norm)
    assert float(epsilon.dot(G)) > 0
    assert float(row.epsilon_length(THETA, G, epsilon, norm)) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("name", CLIMBING)
def test_zero_gradient_zero_theta_and_zero_radius_give_finite_epsilon(name: str) -> None:
    ascent = algorithm(name).ascent
    assert ascent is not None
    nothing = G * 0.0
    assert flat(ascent(THETA, nothing, 0.5, norm)).abs().max() == 0.0
    assert bool(torch.isfinite(flat(ascent(THETA * 0.0, G, 0.5, norm))).all())
    assert flat(ascent(THETA, G, 0.0, norm)).abs().max() == 0.0


def test_the_released_formula_is_not_an_ascent() -> None:
    """d T^2 / ||T g||: the same for every sign of the gradient, so it points downhill as often as
    up."""
    ascent = algorithm("tram_prev", perturbation="released_code_without_gradient").ascent
    assert ascent is not None
    epsilon = ascent(THETA, G, 0.3, norm)
    theta, g = flat(THETA), flat(G)
    assert torch.allclose(flat(epsilon), 0.3 * theta**2 / (theta * g).norm(), rtol=1e-6)
    assert float(epsilon.dot(G)) < 0


@pytest.mark.parametrize(
    ("d", "radius"),
    [(0.2, 1.0), (-1e-9, 0.0), (0.0, 0.0), (9.0, 3.0), (math.inf, 3.0)],
    ids=("scaled", "negative", "zero", "capped", "inf"),
)
def test_radius_of_a_distance(d: float, radius: float) -> None:
    """scale 5, at most 3; rounding below zero counts as zero. An infinite d is caught by the step's
    own finite flag."""
    region = TrustRegion(Previous(), kl_forward, Scaled(5.0), maximum=3.0)
    assert float(region.radius(torch.tensor(d, dtype=torch.float64))) == pytest.approx(radius)


def test_a_distance_that_is_not_a_number_stays_one() -> None:
    assert math.isnan(float(TrustRegion(Previous(), kl_forward).radius(torch.tensor(math.nan))))

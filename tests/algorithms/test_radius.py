"""How large the radius of a trust region is: rules against plain numbers, in the step and in a
checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import problem
from tests.parity.test_identities import same
from tram_ds import wrap
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.options import RHO
from tram_ds.algorithms.radius import Calibrated, Relative, Rule, Scaled
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.checkpoint.resume import resume
from tram_ds.checkpoint.save import Saver
from tram_ds.models.noise import Added, Noise, rms
from tram_ds.models.randomness import StepRandomness

STEPS = problem.global_batches(steps=5, micros=2)


def radii(rule: Rule, distances: list[float]) -> list[float]:
    seen, found = torch.zeros(2, dtype=torch.float64), []
    for value in distances:
        d = torch.tensor(value, dtype=torch.float64)
        found.append(float(rule.radius(d, seen)))
        seen = rule.after(d, seen)
    return found


def test_relative_is_rho_times_d_over_a_mean_in_which_the_newest_counts_most() -> None:
    mean = (0.99 * 1.0 + 3.0) / (0.99 + 1.0)
    found = radii(Relative(0.2), [1.0, 3.0])
    assert found == pytest.approx([0.2, 0.2 * 3.0 / mean], rel=1e-12)


def test_calibrated_is_a_constant_scale_after_its_steps() -> None:
    found = radii(Calibrated(0.3, 2), [1.0, 3.0, 8.0, 0.5])
    assert found == pytest.approx([0.3, 0.3 * 3 / 2, 0.3 * 8 / 2, 0.3 * 0.5 / 2], rel=1e-12)


@pytest.mark.parametrize("rule", (Relative(0.2), Calibrated(0.2, 2)))
def test_what_is_no_distance_is_not_counted(rule: Rule) -> None:
    """theta_{-1} = theta_0 has distance 0; a step that is skipped can have any."""
    found = radii(rule, [0.0, math.nan, math.inf, 2.0, 0.0])
    assert found[0] == 0.0 and not any(map(math.isfinite, found[1:3]))
    assert found[3:] == pytest.approx([0.2, 0.0], rel=1e-12)


@pytest.mark.parametrize("rule", (Scaled(3.0), Relative(0.2), Calibrated(0.2, 9)))
def test_a_constant_distance_is_a_constant_radius(rule: Rule) -> None:
    constant = 0.2 if not isinstance(rule, Scaled) else 3.0 * 1e-5
    assert radii(rule, [1e-5] * 300) == pytest.approx([constant] * 300, rel=1e-12)


def trained(name: str, steps: int = 3, **options: Any) -> list[torch.Tensor]:
    stepper = made(name, **options)
    for batches in STEPS[:steps]:
        stepper.step(batches, problem.forward)
    return list(stepper.engine.params().clone())


def made(name: str, **options: Any) -> Any:
    model = problem.model()
    return wrap(model, torch.optim.SGD(model.parameters(), lr=problem.LR), name, seed=5, **options)


@pytest.mark.parametrize("options", ({"radius": "relative"}, {"radius_scale": "auto"}))
def test_with_a_constant_distance_it_is_asam(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    d = torch.tensor(0.25, dtype=torch.float64)  # a power of 2: rho d / d is rho to the last bit
    monkeypatch.setattr(TrustRegion, "mean", lambda *_: d)
    assert same(trained("tram_x", rho=0.3, **options), trained("asam", rho=0.3))


def test_a_calibration_that_finds_1_is_the_papers() -> None:
    """rho set to the first distance: the scale is 1 from there on."""
    first = float(made("tram_x").step(STEPS[0], problem.forward).distance)
    calibrated = trained("tram_x", radius_scale="auto", calibration_steps=1, rho=first)
    for ours, papers in zip(calibrated, trained("tram_x", radius_max=1e9), strict=True):
        torch.testing.assert_close(ours, papers, rtol=1e-6, atol=1e-9)


def test_the_papers_bound_holds_unless_another_is_set() -> None:
    bounds = {
        "distance": algorithm("tram_x"),
        "none with a rho of its own": algorithm("tram_x", radius="relative"),
        "own": algorithm("tram_x", radius="relative", radius_max=0.7),
        "larger": algorithm("tram_prev", radius_max=2.0),
    }
    found = [row.radius.maximum for row in bounds.values()]  # type: ignore[union-attr]
    assert found == [RHO, None, 0.7, 2.0] and RHO == 0.5
    report = made("tram_x", sigma=3.0).step(STEPS[0], problem.forward)
    assert float(report.distance) > 0.5 and float(report.radius) == 0.5


@pytest.mark.parametrize("accumulation", ("global", "micro"))
def test_a_checkpoint_keeps_what_was_seen(tmp_path: Path, accumulation: str) -> None:
    options = {"radius": "relative", "rho": 0.2, "accumulation": accumulation}
    whole, stopped, resumed = (made("tram_x", **options) for _ in range(3))
    for batches in STEPS:
        expected = whole.step(batches, problem.forward)
    for batches in STEPS[:3]:
        stopped.step(batches, problem.forward)
    with Saver(tmp_path, stopped) as saver:
        saver.save()
    assert resume(resumed, tmp_path) is not None
    for batches in STEPS[3:]:
        report = resumed.step(batches, problem.forward)
    assert float(report.radius) == float(expected.radius) > 0
    assert whole.engine.params().equal(resumed.engine.params())


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("asam", {"radius": "relative"}, "algorithm.name = asam does not read algorithm.radius"),
        ("trpo", {"radius_scale": "auto"}, "does not read algorithm.radius_scale"),
        ("tram_x", {"radius_scale": "auto", "calibration_steps": 0}, "expected more than 0"),
        ("tram_x", {"calibration_steps": 9}, "algorithm.radius_scale = 1.0 does not read"),
        ("tram_x", {"radius": "relative", "radius_scale": 2.0}, "algorithm.radius = relative does"),
        ("tram_x", {"radius_scale": "autto"}, "algorithm.radius_scale = 'autto'"),
        ("tram_x", {"rho": 0.3}, "read by algorithm.radius = relative or algorithm.radius_scale"),
        ("tram_x", {"radius_min": 0.7}, "is above algorithm.radius_max = 0.5"),
        ("sam", {"sigma_unit": "rms"}, "algorithm.name = sam does not read algorithm.sigma_unit"),
    ],
)
def test_what_is_not_read_is_refused(name: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as refused:
        algorithm(name, **options)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_sigma_in_units_of_what_it_is_added_to() -> None:
    """Per position and per picture, so that a row does not depend on its micro-batch. Twice the
    embeddings have twice the noise."""
    x = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    torch.testing.assert_close(rms(x), torch.tensor([[[12.5**0.5], [2.0**0.5]]]))
    pictures = torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), -5.0)])
    assert rms(pictures).flatten().tolist() == [2.0, 5.0]
    draws = StepRandomness(seed=0, step=0)
    plain, relative = (
        Added(Noise("embedding", 0.1, relative=r), draws, 0, False) for r in (False, True)
    )
    z = plain.to(x) - x
    torch.testing.assert_close(plain.to(2 * x) - 2 * x, z)
    torch.testing.assert_close(relative.to(x) - x, z * rms(x))
    torch.testing.assert_close(relative.to(2 * x) - 2 * x, z * rms(x) * 2)
    assert algorithm("r3f", sigma_unit="rms").penalty.reference.noise.relative  # type: ignore

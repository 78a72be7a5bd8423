"""Filter-normalised directions and the loss along them."""

from __future__ import annotations

import pytest
import torch

from tests.parity import problem
from tests.surface.test_sharpness import subject
from tram_ds.engines import replicated
from tram_ds.surface.landscape import Options, direction, filters, measure, plot, steps
from tram_ds.surface.subject import random_direction

W = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.75, 1.0]])
B = torch.tensor([5.0, 12.0])


def engine_of(model):
    return replicated.over(model, torch.optim.SGD(model.parameters(), lr=0.0))


def test_the_line_through_a_quadratic_is_its_parabola_and_the_plane_its_paraboloid():
    curvature = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).double()
    s = subject(W, B, lambda w, b: (curvature * (w - 1).square()).sum() / 2 + b.square().sum())
    options = Options(radius=0.5, points=5, plane_points=3)
    found = measure(s, options)
    d1, d2 = (direction(s.engine, s.seed, f"landscape {i}", options)[0] for i in (1, 2))

    def expected(a: float, b: float) -> float:
        return float(
            (curvature * (W + a * d1 + b * d2 - 1).square()).sum() / 2 + B.double().square().sum()
        )

    assert found["at"] == [-0.5, -0.25, 0.0, 0.25, 0.5] and found["at_plane"] == [-0.5, 0.0, 0.5]
    assert found["line"] == pytest.approx([expected(a, 0.0) for a in found["at"]], rel=1e-12)
    for i, a in enumerate(found["at_plane"]):
        assert found["plane"][i] == pytest.approx(
            [expected(a, b) for b in found["at_plane"]], rel=1e-12
        )
    assert (
        found["line"][2] == found["plane"][1][1] == s.loss()
        and found["plane"][0][1] == found["line"][0]
    )
    second = found["line"][0] - 2 * found["line"][2] + found["line"][4]
    assert second / 0.5**2 == pytest.approx(float((curvature * d1.square()).sum()), rel=1e-10)


def test_every_row_has_the_norm_of_the_weights_row():
    s = subject(W, B, lambda w, b: w.sum() + b.sum())
    d = direction(s.engine, 0, "x", Options())
    drawn = random_direction(s.engine, 0, "x")
    assert d[0].norm(dim=1).tolist() == pytest.approx([5.0, 0.0, 1.25], abs=1e-8)
    assert torch.allclose(d[0][0] / d[0][0].norm(), drawn[0][0] / drawn[0][0].norm())
    assert not d[1].any(), "vectors stay fixed"
    assert direction(s.engine, 0, "x", Options(vectors="scaled"))[1].norm() == pytest.approx(13.0)
    whole = direction(s.engine, 0, "x", Options(normalise="parameter"))[0]
    assert whole.norm() == pytest.approx((25 + 1.25**2) ** 0.5) and torch.allclose(
        whole / whole.norm(), drawn[0] / drawn[0].norm()
    )


def test_the_filters_of_gpt2s_transposed_layers_are_columns():
    model = problem.model()
    engine = engine_of(model)
    d = dict(
        zip(
            (span.name for span in engine.layout), direction(engine, 0, "x", Options()), strict=True
        )
    )
    for name, dim in (("transformer.h.0.mlp.c_fc.weight", 0), ("transformer.wte.weight", 1)):
        weight = dict(model.named_parameters())[name].detach()
        assert torch.allclose(d[name].norm(dim=dim), weight.norm(dim=dim), rtol=1e-4)
    cut = filters(engine, "filter")
    assert (
        cut["transformer.h.0.mlp.c_fc.weight"].count == 40
        and cut["transformer.wte.weight"].count == 19
    )
    assert cut["transformer.ln_f.bias"].count == 1 and list(cut) == [
        span.name for span in engine.layout
    ]


def test_directions_differ_by_name_and_seed_alone():
    engine = engine_of(problem.model())
    first = direction(engine, 0, "x", Options())
    assert first.equal(direction(engine_of(problem.model()), 0, "x", Options()))
    assert not first.equal(direction(engine, 1, "x", Options())) and not first.equal(
        direction(engine, 0, "y", Options())
    )


def test_steps_are_symmetric_around_exactly_0():
    for points in (3, 11, 21):
        at = steps(0.7, points)
        assert at[points // 2] == 0.0 and at == [-a for a in reversed(at)] and at[-1] == 0.7
    assert steps(1.0, 0) == []


def test_figures_are_written(tmp_path):
    result = {
        "at": [-1.0, 0.0, 1.0],
        "line": [2.0, 1.0, 3.0],
        "at_plane": [-1.0, 0.0, 1.0],
        "plane": [[2, 1, 2], [1, 0, 1], [3, 1, 2]],
    }
    files = plot(
        {"en": result, "sw": {**result, "at_plane": [], "plane": []}},
        tmp_path / "analysis",
        "a title",
    )
    assert [f.name for f in files] == [
        "landscape.png",
        "landscape.svg",
        "landscape-en.png",
        "landscape-en.svg",
    ]
    assert files[0].read_bytes().startswith(b"\x89PNG") and "<svg" in files[1].read_text()

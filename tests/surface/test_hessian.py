"""The largest Hessian eigenvalue of functions whose spectrum is known."""

from __future__ import annotations

import pytest
import torch

from tests.parity import problem
from tests.surface.test_sharpness import subject
from tram_ds.engines import replicated
from tram_ds.surface.hessian import Options, measure
from tram_ds.surface.subject import Subject

TIGHT = Options(h=1e-2, tolerance=1e-6)


def quadratic(eigenvalues):
    """A quadratic over w (2, 4) and b (2,) with these ten eigenvalues in a random basis, not at its
    minimum."""
    g = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(10, 10, generator=g, dtype=torch.float64))[0]
    h = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    w, b = torch.randn(2, 4, generator=g), torch.randn(2, generator=g)
    x = lambda w, b: torch.cat([w.flatten(), b])  # noqa: E731
    return subject(w, b, lambda w, b: x(w, b) @ h @ x(w, b) / 2 + x(w, b).sum() + 50.0)


@pytest.mark.parametrize(
    "eigenvalues, top",
    [
        ([7.0, 3.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0], 7.0),
        ([2.0, 1.9, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0, -3.0, -40.0], 2.0),  # larger in magnitude below
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, -10.0], -1.0),
        ([5.0] * 10, 5.0),
    ],
)
def test_the_top_eigenvalue_of_a_quadratic(eigenvalues, top):
    found = measure(quadratic(eigenvalues), TIGHT)
    assert found["value"] == pytest.approx(top, rel=1e-6) and found["converged"]
    assert found["residual"] <= 1e-6


def test_a_linear_loss_has_none_and_few_products_are_owned_up_to():
    assert measure(quadratic([0.0] * 10), TIGHT)["value"] == pytest.approx(0.0, abs=1e-9)
    few = measure(
        quadratic([float(i) for i in range(1, 11)]), Options(iterations=2, tolerance=1e-6)
    )
    assert not few["converged"] and few["residual"] > 1e-6 and 5.0 < few["value"] <= 10.0


def test_equals_the_exact_hessian_of_a_small_model_and_uses_the_rows_asked_for():
    """A tiny GPT-2 in float64: against the dense Hessian by double backward over its final
    LayerNorm and one bias."""
    model = problem.double(problem.model())
    for name, p in model.named_parameters():
        p.requires_grad_(name in ("transformer.ln_f.weight", "transformer.h.0.mlp.c_proj.bias"))
    batches = [problem.batch(0, k) for k in range(3)]
    engine = replicated.over(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    )
    s = Subject(engine, problem.forward, lambda numbers: batches[numbers[0]], 3, 1)
    found = measure(s, Options(h=1e-4, tolerance=1e-5, rows=2))
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = [problem.forward(model.eval(), b) for b in batches[:2]]
    loss = torch.stack([o.loss_sum for o in outputs]).sum() / sum(int(o.count) for o in outputs)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    rows = [
        torch.cat([r.flatten() for r in torch.autograd.grad(g, parameters, retain_graph=True)])
        for g in gradient
    ]
    assert found["value"] == pytest.approx(
        float(torch.linalg.eigvalsh(torch.stack(rows))[-1]), rel=1e-5
    )
    assert found["rows"] == 2 and found["converged"]

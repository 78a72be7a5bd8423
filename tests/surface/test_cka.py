"""Linear CKA: what it must not notice, what it must, and where its features come from."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.parity import problem
from tram_ds.engines import replicated
from tram_ds.surface.cka import Options, features, linear_cka, measure, pool
from tram_ds.surface.subject import Subject, random_direction

G = torch.Generator().manual_seed(0)
X = torch.randn(40, 12, generator=G, dtype=torch.float64) + 3.0
Q = torch.linalg.qr(torch.randn(12, 12, generator=G, dtype=torch.float64))[0]


@pytest.mark.parametrize("centred", [True, False])
def test_a_matrix_is_like_itself_turned_and_scaled(centred):
    for y in (X, X @ Q, -2.5 * X):
        assert linear_cka(X, y, centred) == pytest.approx(1.0, abs=1e-12)


def test_centring_removes_an_offset_and_nothing_else():
    offset = 9.0 * torch.arange(12).double()
    assert linear_cka(X, X + offset) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(X - X.mean(0), X - X.mean(0) + offset, centred=False) < 0.1
    centred = X - X.mean(0)
    assert linear_cka(X, X[:, :5]) == pytest.approx(
        linear_cka(centred, centred[:, :5], centred=False), rel=1e-12
    )


def test_equals_its_definition_by_gram_matrices():
    """<K, L> / (|K| |L|) with K = X X^T, L = Y Y^T, both centred by rows and columns: HSIC as
    Kornblith et al. write it."""
    y = torch.randn(40, 7, generator=G, dtype=torch.float64)
    h = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, m = h @ X @ X.T @ h, h @ y @ y.T @ h
    assert linear_cka(X, y) == pytest.approx(
        float((k * m).sum() / (k.norm() * m.norm())), rel=1e-10
    )
    assert (
        linear_cka(X, y) == pytest.approx(linear_cka(y, X), rel=1e-12)
        and 0 < linear_cka(X, y) < 0.6
    )


def test_orthogonal_features_are_0():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).T
    y = torch.tensor([[1.0, 1.0, -1.0, -1.0]]).T
    assert linear_cka(x, y) == pytest.approx(0.0, abs=1e-15)


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="40 rows against 39"):
        linear_cka(X, X[:39])
    with pytest.raises(ValueError, match=r"same representation.*cka.pooling=mean"):
        linear_cka(X, torch.ones(40, 3))


def test_pooling_reads_the_first_token_or_averages_without_padding():
    states, mask = torch.arange(12.0).view(2, 3, 2), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert pool(states, {}, "first").tolist() == [[0, 1], [6, 7]]
    assert pool(states, {"attention_mask": mask}, "mean").tolist() == [[2, 3], [7, 8]]
    assert pool(states, {}, "mean").tolist() == [[2, 3], [8, 9]]


def subject(model, rows=5):
    one = [{k: v[i : i + 1] for k, v in problem.batch(0, 1).items()} for i in range(3)] + [
        problem.batch(0, 5)
    ] * 2

    def batch(numbers):
        assert len(numbers) == 1
        return {k: v[:1] for k, v in one[numbers[0]].items()}

    engine = replicated.over(model, torch.optim.SGD(model.parameters(), lr=0.0))
    return Subject(engine, problem.forward, batch, rows, 1)


def test_features_are_the_base_models_last_states_in_the_order_of_the_rows():
    model = problem.model(dropout=0.3)
    s = subject(model)
    found = features(s, None, "mean")
    assert found.shape == (5, 10) and found.dtype == torch.float64 and model.training
    model.eval()
    for i in range(5):
        batch = s.batch([i])
        states = model.transformer(**batch).last_hidden_state.detach().double()
        mask = batch["attention_mask"].unsqueeze(-1)
        assert torch.allclose(found[i], (states * mask).sum(1)[0] / mask.sum(), atol=1e-6)


def test_a_model_is_like_itself_and_less_like_a_distant_one():
    s = subject(problem.model())
    theta = s.engine.params(keep=True)
    noise = random_direction(s.engine, 0, "noise")
    near, far = (
        measure(s, theta + noise * size, Options(), classification=False)["value"]
        for size in (0.01, 1.0)
    )
    itself = measure(s, theta, Options(), classification=False)
    assert (
        itself["value"] == pytest.approx(1.0, abs=1e-10)
        and itself["pooling"] == "mean"
        and itself["rows"] == 5
    )
    assert far < near < 1.0 and near > 0.99
    assert measure(s, theta, Options(), classification=True)["pooling"] == "first"


def test_a_model_without_a_head_is_refused():
    config = GPT2Config(vocab_size=19, n_positions=12, n_embd=10, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="GPT2Model has no base model"):
        features(subject(GPT2LMHeadModel(config).transformer), None, "first")

"""Shapes and kinds of what is handed in: right, or refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.wrap.hand import LR, agree, batches, forward, gap, mlp, sgd
from tram_ds.algorithms.stepper import wrap
from tram_ds.models.output import Output

CLOSE = 2e-6
IDS = [(torch.arange(6), torch.arange(3, 9)), (torch.tensor([1, 1, 2]), torch.tensor([0, 4, 4]))]


class Words(nn.Module):
    def __init__(self, sparse: bool = False, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.o = nn.Embedding(9, 6, sparse=sparse), nn.Linear(6, 9, bias=False)
        if tied:
            self.o.weight = self.e.weight

    def forward(self, x: Any) -> Any:
        return self.o(torch.tanh(self.e(x)))


def test_sparse_gradients_are_those_of_a_dense_embedding() -> None:
    assert agree(lambda: Words(sparse=True), data=IDS) < CLOSE


def test_tied_weights_are_moved_once() -> None:
    assert agree(lambda: Words(tied=True), data=IDS) < CLOSE


def with_parameter(value: Any) -> nn.Sequential:
    model = mlp()
    model.extra = nn.Parameter(value)  # type: ignore[assignment]
    return model


BASE = torch.arange(24.0).view(4, 6)
REFUSED = {
    "column_slice": (lambda: BASE[:, 1:3], "strided view.*contiguous_format"),
    "expanded": (lambda: torch.ones(1, 3).expand(4, 3), "strided view"),
    "complex": (lambda: torch.ones(3, dtype=torch.cfloat), "complex64.*view_as_real"),
    "half": (lambda: torch.ones(3, dtype=torch.float16), "float16.*bfloat16 for a"),
    "meta": (lambda: torch.ones(3, device="meta"), "several|meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_cannot_be_moved_and_put_back(name: str) -> None:
    make, words = REFUSED[name]
    model = with_parameter(make())
    with pytest.raises(ValueError, match=f"extra is .*({words})"):
        wrap(model, sgd(model))


def test_parameters_over_each_others_memory_are_refused() -> None:
    model = mlp()
    model.extra = nn.Parameter(model[0].weight.data[1:3])  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"0.weight and extra share memory"):
        wrap(model, sgd(model))


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run one forward"):
        wrap(model, torch.optim.SGD(model.parameters(), lr=LR))


def test_nothing_to_train_is_refused() -> None:
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="no trainable parameter"):
        wrap(model.requires_grad_(False), optimizer)


def test_other_memory_orders_and_double_precision_are_right() -> None:
    class Strides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.c = nn.Conv2d(2, 4, 2).to(memory_format=torch.channels_last)
            self.t = nn.Parameter(torch.randn(3, 16).t())
            self.d = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Any) -> Any:
            x = x[:, :2, None, None].expand(-1, -1, 3, 3).contiguous()
            return (torch.tanh(self.c(x).flatten(1)) @ self.t) * self.d.float()

    assert agree(Strides) < CLOSE


@pytest.mark.parametrize("weights", [[0.25, 0.5, 0.125], [2.5, 0.5, 7.25]])
def test_a_weighted_loss_is_divided_by_the_sum_of_its_weights(weights: list[float]) -> None:
    """Also below one: nothing is rounded to a count of targets."""
    scale = torch.tensor(weights * 2)

    def run(model: Any, batch: Any) -> Any:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (losses * scale).sum(), scale.sum() / 10, model(batch[0])

    assert agree(mlp, run=run) < 2e-5  # gradients ten times as large


def test_an_epsilon_per_micro_batch_is_weighted_by_sums_of_weights_below_one_too() -> None:
    """Of one micro-batch it is the epsilon of the whole batch."""
    weights = torch.tensor([0.05, 0.1, 0.05, 0.1, 0.05, 0.05])

    def run(model: Any, batch: Any) -> Any:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (losses * weights).sum(), weights.sum(), model(batch[0])

    models, reports = (mlp(), mlp()), []
    for model, accumulation in zip(models, ("global", "micro"), strict=True):
        stepper = wrap(model, sgd(model), "sam", rho=0.5, accumulation=accumulation)
        reports.append(stepper.step(batches(1), run))
    assert gap(*models) < CLOSE and gap(models[0], mlp()) > 1e-3
    for name in ("loss", "perturbed_loss", "radius", "ascent_norm", "grad_norm"):
        whole, each = (float(getattr(report, name)) for report in reports)
        assert each == pytest.approx(whole, rel=1e-5), name


RETURNED = {
    "a mean over rows": (lambda z, y: (F.cross_entropy(z, y, reduction="none"), 6, z), "loss_sum"),
    "a float": (lambda z, y: (1.0, 6, z), "loss_sum float"),
    "a detached loss": (lambda z, y: (F.cross_entropy(z, y).detach(), 6, z), "has no gradient"),
    "a loss alone": (lambda z, y: F.cross_entropy(z, y), "returned a Tensor"),
    "a count per row": (lambda z, y: (z.sum(), torch.ones(6), z), r"count \(6,\)"),
    "a negative count": (lambda z, y: (z.sum(), -1, z), "count -1"),
    "one output": (lambda z, y: (z.sum(), 6, z[:, 0]), r"logits \(6,\): a distance needs"),
    "no logits": (lambda z, y: (z.sum(), 6, None), "logits NoneType"),
    "counted of another length": (
        lambda z, y: Output(z.sum(), 6, z, counted=y[1:] > 0),
        "of 5 for 6",
    ),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_forward_returns_is_said_where_it_is_wrong(name: str) -> None:
    returned, words = RETURNED[name]
    model = mlp()
    stepper = wrap(model, sgd(model), "tram_prev")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        stepper.step(batches(1), lambda m, b: returned(m(b[0]), b[1]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_loss_without_logits_is_enough_where_nothing_is_compared() -> None:
    def run(model: Any, batch: Any) -> Any:
        return model(batch[0]).square().sum(), 6, None

    assert agree(mlp, run=run) < 2e-5


def test_positions_that_differ_from_call_to_call_are_refused() -> None:
    model, calls = mlp(), iter(range(99))

    def run(m: Any, batch: Any) -> Any:
        z = m(batch[0])[next(calls) % 2 :]
        return z.sum(), 6, z

    with pytest.raises(ValueError, match=r"reference predicts \(6, 3\) and the model now \(5, 3\)"):
        wrap(model, sgd(model), "tram_prev").step(batches(1), run)


def said(row: str, steps: int = 3, lr: float = LR, **options: Any) -> list[str]:
    model = mlp()
    stepper = wrap(model, torch.optim.SGD(model.parameters(), lr=lr), row, **options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            stepper.step(batches(), forward)
    return [str(w.message) for w in found]


def test_a_distance_of_exactly_0_after_the_first_step_is_said_once() -> None:
    """A learning rate of 0: theta_{t-1} is theta_t."""
    start, once = said("tram_prev", lr=0.0)
    assert start.startswith("the model has no active dropout")
    assert once.startswith("the distance of step 2 is exactly 0")
    assert said("tram_prev") == [start], "at the first step it is 0 by definition"


def test_a_perturbation_below_the_weights_precision_is_said_once() -> None:
    (once,) = said("sam", rho=1e-12)
    assert once.startswith("the loss of step 1 at theta + epsilon is bit for bit")
    assert said("sam", rho=0.05) == [] and said("base") == []


class Scheduled(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


OPTIMIZERS = {
    "lbfgs": (torch.optim.LBFGS, "LBFGS.step.. needs a closure.*AdamW"),
    "a closure of one's own": (lambda p: Scheduled(p, lr=LR), "Scheduled.step.. needs a closure"),
    "sparse_adam": (torch.optim.SparseAdam, "SparseAdam needs sparse"),
    "differentiable": (lambda p: torch.optim.SGD(p, lr=LR, differentiable=True), "differentiable"),
    "maximize": (lambda p: torch.optim.Adam(p, lr=LR, maximize=True), "maximize=True goes up"),
    "maximize in one group": (
        lambda p: torch.optim.SGD([{"params": p[:1], "maximize": True}, {"params": p[1:]}], lr=LR),
        "maximize=True goes up",
    ),
    "capturable on a CPU": (lambda p: torch.optim.Adam(p, capturable=True), "steps on a GPU alone"),
    "capturable in one group": (
        lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "capturable": True}]),
        "capturable=True steps on a GPU alone",
    ),
    "no optimizer": (lambda p: "adam", "'adam' is no torch optimizer"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_cannot_take_a_second_gradient_are_refused(name: str) -> None:
    make, words = OPTIMIZERS[name]
    model = mlp()
    with pytest.raises(ValueError, match=words):
        wrap(model, make(list(model.parameters())))


def test_an_optimizer_step_inside_backward_is_refused() -> None:
    model = mlp()
    optimizer = sgd(model)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"0\.weight has a post-accumulate-grad hook"):
        wrap(model, optimizer)


def test_a_plain_module_in_a_job_of_several_ranks_is_refused(monkeypatch: Any) -> None:
    """torchrun, and init_process_group forgotten: every rank would train a model of its own."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    model = mlp()
    with pytest.raises(ValueError, match="4 different models: wrap it in DistributedDataParallel"):
        wrap(model, sgd(model))

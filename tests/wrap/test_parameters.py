"""The set of trained parameters: followed when it changes, or refused at that step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.wrap.hand import LR, agree, batches, forward, gap, mlp, sam_step, sgd
from tram_ds.algorithms.stepper import wrap

pytestmark = pytest.mark.filterwarnings("ignore:the parameters changed after wrap")
CLOSE = 2e-6  # of weights of size 1, after three fp32 steps in another order of sums


def all_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def test_an_optimizer_over_some_of_them_is_refused_and_says_what_is_missing() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"does not hold 0.weight \(2 of 4.*requires_grad_"):
        wrap(model, torch.optim.SGD(model[2].parameters(), lr=LR))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="holds none of the model's trainable parameters"):
        wrap(mlp(), sgd(mlp(seed=3)))


def test_an_optimizer_over_more_than_the_model_is_refused() -> None:
    """A temperature outside the module would get the sum of gradients, not their mean."""
    model, temperature = mlp(), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"also holds 1 trainable .*shape \(1,\).*ModuleList"):
        wrap(model, torch.optim.SGD([*model.parameters(), temperature], lr=LR))


def test_a_group_with_lr_0_climbs_and_never_descends() -> None:
    """The way out that the refusal of a subset names."""

    def optimizer(model: Any) -> torch.optim.Optimizer:
        groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.0}]
        return torch.optim.SGD(groups, lr=LR)

    assert agree(mlp, optimizer) < CLOSE


def frozen() -> nn.Sequential:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def test_a_layer_unfrozen_later_is_trained_by_the_mean_from_then_on() -> None:
    def unfreeze(step: int, model: Any, _: Any) -> None:
        model[0].requires_grad_(step > 0)

    assert agree(frozen, all_of, between=unfreeze) < CLOSE


def test_a_layer_frozen_later_stays() -> None:
    def freeze(step: int, model: Any, _: Any) -> None:
        model[0].requires_grad_(step == 0)

    assert agree(mlp, all_of, between=freeze) < CLOSE


def test_a_head_replaced_and_given_to_the_optimizer_is_trained() -> None:
    def replace(step: int, model: Any, optimizer: Any) -> None:
        if step == 1:
            model[2] = mlp(seed=7)[2]
            optimizer.add_param_group({"params": model[2].parameters()})

    assert agree(mlp, all_of, between=replace) < CLOSE


def test_a_head_replaced_and_forgotten_is_refused_at_that_step() -> None:
    model = mlp()
    stepper = wrap(model, all_of(model), "sam")
    stepper.step(batches(), forward)
    model[2] = mlp(seed=7)[2]
    with pytest.raises(ValueError, match=r"does not hold 2.weight .*add_param_group"):
        stepper.step(batches(), forward)


def test_a_parametrization_added_later_is_followed() -> None:
    def prune(step: int, model: Any, optimizer: Any) -> None:
        if step == 1:
            parametrizations.weight_norm(model[0])
            new = model[0].parametrizations.weight
            optimizer.add_param_group({"params": [new.original0, new.original1]})

    assert agree(mlp, all_of, between=prune) < CLOSE


def test_an_embedding_resized_in_place_is_followed() -> None:
    """resize_token_embeddings of some libraries keeps the Parameter and changes its data."""

    def grow(step: int, model: Any, _: Any) -> None:
        if step == 1:
            model[2].bias.data = torch.cat([model[2].bias.data, torch.zeros(1)])
            model[2].weight.data = torch.cat([model[2].weight.data, torch.zeros(1, 8)])

    assert agree(mlp, all_of, between=grow) < CLOSE


class Adapted(nn.Module):
    """A frozen layer with two low-rank adapters, of which one is switched on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(5, 3).requires_grad_(False)
        self.adapters = nn.ModuleDict({name: nn.Linear(5, 3, bias=False) for name in "ab"})
        self.switch("a")

    def switch(self, name: str) -> None:
        self.active = name
        for key, adapter in self.adapters.items():
            adapter.requires_grad_(key == name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapters[self.active](x)


def test_adapters_switched_after_wrap_are_followed() -> None:
    assert (
        agree(Adapted, all_of, between=lambda step, m, _: m.switch("ab"[step > 0])) < CLOSE  # type: ignore[attr-defined]
    )


def test_references_keep_what_they_can_and_it_is_said_once() -> None:
    """tram_init: a layer unfrozen later is remembered as it was then, the others as at first."""
    model = frozen()
    stepper = wrap(model, all_of(model), "tram_init", radius_scale=10.0)
    at_first = model[2].weight.detach().clone()
    for _ in range(2):
        stepper.step(batches(), forward)
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="trained from now on: 0.bias, 0.weight") as said:
        for _ in range(2):
            stepper.step(batches(), forward)
    assert len([w for w in said if "trained from now on" in str(w.message)]) == 1
    initial = stepper.state().references["initial"]
    kept = {span.name: piece for span, piece in zip(initial.layout, initial, strict=True)}
    assert torch.equal(kept["0.weight"], before) and torch.equal(kept["2.weight"], at_first)
    assert not torch.equal(model[2].weight, at_first)


def test_a_parameter_that_gets_no_gradient_is_passed_over_as_torch_does() -> None:
    """Weight decay and momentum must not move what nothing depends on."""

    def make() -> nn.Sequential:
        model = mlp()
        model.unused = nn.Linear(2, 2)  # type: ignore[assignment]
        model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
        return model

    decay = lambda m: torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=0.5)  # noqa: E731
    assert agree(make, decay) < 1e-4  # AdamW divides by the root of squares near 0
    model, fresh = make(), make()
    wrap(model, decay(model), "sam").step(batches(), forward)
    assert torch.equal(model.unused.weight, fresh.unused.weight)


def test_two_models_with_a_stepper_each_do_not_touch_each_other() -> None:
    ours, theirs = (mlp(), mlp(seed=1)), (mlp(), mlp(seed=1))
    steppers = [wrap(m, sgd(m), "sam", rho=0.5) for m in theirs]
    optimizers = [sgd(m) for m in ours]
    for _ in range(3):
        for i in range(2):
            through = lambda m, b, o=ours[1 - i]: forward(lambda x: m(x) + o(x).detach(), b)  # noqa: E731
            sam_step(ours[i], optimizers[i], batches(), through)
            through = lambda m, b, o=theirs[1 - i]: forward(lambda x: m(x) + o(x).detach(), b)  # noqa: E731
            steppers[i].step(batches(), through)
    assert max(gap(a, b) for a, b in zip(ours, theirs, strict=True)) < CLOSE

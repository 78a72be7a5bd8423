"""Functional-SAM, by hand and where it is another method; and forwards whose loss cannot be taken
apart, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.parity import problem
from tests.parity.test_identities import close, same, train
from tram_ds.algorithms.effect import measure
from tram_ds.algorithms.stepper import wrap


class Squared(nn.Module):
    """y = w^2 x of one weight, 2 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w.square() * x


def half_square(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    y = model(x)
    return (y.square() / 2).sum(), len(x), y


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_by_hand() -> None:
    """L = y^2 / 2 and y = w^2, so dL/dy = 4 and dL/dw = 4 * 2 w = 16 at w = 2; dy/dw = 5 at
    2 + .5. So the descent is by 4 * 5 = 20, where SAM's is by 2.5^2 * 5 = 31.25."""
    for row, descent in (("functional_sam", 20.0), ("sam", 31.25)):
        model = Squared()
        report = wrap(model, sgd(model), row, rho=0.5).step([torch.ones(1)], half_square)
        assert float(report.ascent_norm) == pytest.approx(16.0)
        assert float(report.loss) == 8.0
        assert float(report.perturbed_loss) == pytest.approx(2.5**4 / 2)
        assert float(report.grad_norm) == pytest.approx(descent)
        assert model.w.item() == pytest.approx(2.0 - 0.1 * descent, abs=1e-6)


def test_of_a_loss_that_is_linear_in_the_logits_it_is_sam() -> None:
    """dL/dlogits is the same everywhere then."""
    ends = []
    for row in ("functional_sam", "sam"):
        model = problem.model()
        built = wrap(model, sgd(model), row, rho=0.3)

        def forward(m: Any, b: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int, torch.Tensor]:
            logits = m(**b).logits
            return logits[..., 0].sum() - logits[..., 1].sum(), 10, logits

        for batches in problem.global_batches(2, 2):
            built.step(batches, forward)
        ends.append([p.detach() for p in model.parameters()])
    assert close(*ends)
    assert not close(train("functional_sam", rho=0.3)[0], train("sam", rho=0.3)[0], 1e-3)


@pytest.mark.parametrize("options", [{}, {"accumulation": "micro"}, {"perturb_every": 2}])
def test_at_an_epsilon_of_nothing_it_is_base_bit_for_bit(options: dict[str, Any]) -> None:
    """With dropout: pass 2 has the masks that dL/dlogits is of."""
    found = train("functional_sam", dropout=0.2, rho=1e-12, **options)[0]
    if options.get("accumulation") == "micro":  # its sums are added in another order
        assert close(found, train("base", dropout=0.2)[0])
    else:
        assert same(found, train("base", dropout=0.2)[0])


@problem.few_rows()
def test_logits_in_chunks_are_taken_apart_as_whole_ones_are() -> None:
    """With dropout and uneven rows; the effect of a step, too."""
    found, changes = [], []
    for forward in (problem.forward, problem.chunked_forward()):
        model = problem.model(0.2)
        built = wrap(model, sgd(model), "functional_sam", rho=0.3, seed=problem.SEED)
        changes.append(measure(built, problem.global_batches(1, 2)[0], forward).change)
        for batches in problem.global_batches(3, 2):
            built.step(batches, forward)
        found.append([p.detach() for p in model.parameters()])
    assert close(*found)
    assert changes[0] == pytest.approx(changes[1], rel=1e-4) and changes[0] > 1e-2


def test_a_preconditioned_step_by_hand() -> None:
    """L = 3 w_1 + 4 w_2. Adam's v at step 1 is g^2, so g / sqrt(v) is (1, 1) and epsilon
    rho / sqrt(2) of both, where SAM's is along (3, 4). The same at step 2, whose v is g^2 again."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    built = wrap(model, optimizer, "sam", precondition=True, rho=0.5)

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, None]:
        return m(x).sum(), 1, None

    for _ in range(2):
        report = built.step([torch.tensor([[3.0, 4.0]])], forward)
        gap = float(report.perturbed_loss - report.loss)
        assert gap == pytest.approx(0.5 * 7 / 2**0.5, rel=1e-5)
        assert float(report.ascent_norm) == pytest.approx(2**0.5, rel=1e-5)


def test_what_no_batch_has_reached_before_takes_no_more_of_epsilon_than_the_rest() -> None:
    """A word seen first at step 2: v was 0 there, and g / eps would be all of epsilon."""
    model = nn.Embedding(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.5))
    built = wrap(model, optimizer, "sam", precondition=True, rho=0.5)

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, None]:
        return m(x).sum(), 1, None

    built.step([torch.tensor([0])], forward)
    report = built.step([torch.tensor([0, 1])], forward)
    # v / (1 - .5^2) with g = 1: (.5 * .5 + .5) / .75 = 1 of word 0, .5 / .75 of word 1
    divided = torch.tensor([1.0, 1.5**0.5])
    want = 0.5 * float(divided.sum() / divided.norm())
    assert float(report.perturbed_loss - report.loss) == pytest.approx(want, rel=1e-5)


def test_second_moments_that_are_not_there_are_refused() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^algorithm.precondition .*SGD keeps none: use Adam"):
        wrap(model, sgd(model), "functional_sam", precondition=True)
    groups = [{"params": [p], "eps": 10.0 ** -(8 + i)} for i, p in enumerate(model.parameters())]
    with pytest.raises(ValueError, match=r"^algorithm.precondition .*groups differ"):
        wrap(model, torch.optim.Adam(groups), "sam", precondition=True)
    with pytest.raises(ValueError, match=r"does not read algorithm.precondition"):
        wrap(model, torch.optim.Adam(model.parameters()), "asam", precondition=True)


def twice(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    y = m(x) + m(2 * x)
    return y.sum(), 1, y


def by_itself(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    y = m(x)
    return y.sum() + m.w.square().sum(), 1, y


def past_it(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    y = m.w * x
    return y.sum(), 1, y


def made_inside(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    y = m(x)
    return y, 1, y


def detached(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    y = m(x)
    return y.detach().sum(), 1, y


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (twice, "calls the model once, and this one called it 2 times"),
        (past_it, "called it 0 times"),
        (by_itself, "of weights that it reads itself: compute it in forward"),
        (made_inside, "of a loss that the model made: compute it in forward"),
        (detached, "loss_sum has no gradient"),
    ],
)
def test_a_loss_that_cannot_be_taken_apart_is_refused_and_nothing_moves(
    forward: Any, said: str
) -> None:
    model = Squared()
    if forward is made_inside:
        plain = model.forward
        model.forward = lambda x: plain(x).sum()
    built = wrap(model, sgd(model), "functional_sam")
    with pytest.raises(ValueError, match=said):
        built.step([torch.ones(1)], forward)
    assert model.w.item() == 2.0 and not model._forward_hooks


def test_what_the_loss_does_not_read_of_a_models_output_is_left_out() -> None:
    """A tuple, a mapping or a model's own output; hidden states beside the logits."""

    class Several(Squared):
        def forward(self, x: torch.Tensor) -> Any:
            return {"hidden": self.w * x, "none": None, "logits": super().forward(x)}

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        return half_square(lambda x: m(x)["logits"], x)

    model = Several()
    report = wrap(model, sgd(model), "functional_sam", rho=0.5).step([torch.ones(1)], forward)
    assert float(report.grad_norm) == pytest.approx(20.0)

"""epsilon-sharpness of losses whose maximum over the box is known in closed form, and Table 6's
correlation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tram_ds.comparison.transfer import pearson, transfer
from tram_ds.engines import replicated
from tram_ds.models.output import Output
from tram_ds.surface.analyze import names, split_overrides
from tram_ds.surface.sharpness import Options, measure
from tram_ds.surface.subject import BLOCK, Subject, normal


class Weights(nn.Module):
    """w (rows, columns) and b (columns,) in float64, with a dropout whose mode a test can see."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w.double()), nn.Parameter(b.double())

    def forward(self, x: Any) -> Tensor:
        return x


def subject(w: Tensor, b: Tensor, loss: Any, rows: int = 5, micro_batch: int = 2) -> Subject:
    """Every row has the loss `loss(w, b)` times its weight, row number + 1 over their mean: the
    mean loss is `loss`."""
    model = Weights(w, b)
    weight = torch.arange(1, rows + 1).double() / ((rows + 1) / 2)

    def forward(m: Any, numbers: Tensor) -> Output:
        total = loss(m.w, m.b) * weight[m(numbers)].sum()
        return Output(total, len(numbers), torch.zeros(len(numbers), 1))

    engine = replicated.over(model, torch.optim.SGD(model.parameters(), lr=0.0))
    return Subject(engine, forward, lambda numbers: torch.tensor(list(numbers)), rows, micro_batch)


W = torch.tensor([[0.5, -2.0, 0.0], [1.5, 0.25, -0.75]]).double()
B = torch.tensor([1.0, -1.0, 3.0]).double()
SLOPE = torch.tensor([[1.0, -0.5, 2.0], [0.25, -1.0, 0.125]]).double()


def test_a_linear_loss_rises_by_its_slope_over_the_box():
    """max over |z| <= epsilon (|w| + 1) of slope . z = epsilon sum |slope| (|w| + 1)."""
    s = subject(W, B, lambda w, b: 3.0 + (SLOPE * w).sum() + 0.0 * b.sum())
    found = measure(s, Options(epsilon=1e-2, lr=1.0, batch=1, accumulation=1))
    base = float(3.0 + (SLOPE * W).sum())
    rise = float(1e-2 * (SLOPE.abs() * (W.abs() + 1)).sum())
    assert found["value"] == pytest.approx(100 * rise / (1 + base), rel=1e-12)
    assert found["loss"] == pytest.approx(base) and found["max_loss"] == pytest.approx(base + rise)
    # b has no gradient
    assert found["steps"] == 5 and found["at_bound"] == pytest.approx(6 / 9, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_a_separable_quadratic_is_largest_at_a_corner_of_the_box(micro_batch):
    centre, curvature = (
        torch.zeros_like(W) + 0.3,
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double(),
    )

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return (curvature * (w - centre).square()).sum() / 2 + b.square().sum() / 2

    corner_w = W + torch.sign(W - centre) * 0.1 * (W.abs() + 1)
    corner_b = B + torch.sign(B) * 0.1 * (B.abs() + 1)
    base, top = float(loss(W, B)), float(loss(corner_w, corner_b))
    found = measure(
        subject(W, B, loss, micro_batch=micro_batch),
        Options(epsilon=0.1, lr=5.0, batch=2, accumulation=1),
    )
    assert found["value"] == pytest.approx(100 * (top - base) / (1 + base), rel=1e-10)
    assert found["at_bound"] == pytest.approx(1.0, rel=1e-6)


def test_a_small_learning_rate_stops_short_of_the_box():
    """Each of the steps adds lr times the mean gradient over its rows: the ascent of a linear loss
    is known exactly."""
    options = Options(epsilon=10.0, lr=0.01, batch=2, accumulation=2)
    s = subject(W.abs(), B, lambda w, b: 3.0 + (SLOPE * w).sum() + 0 * b.sum(), rows=8)
    weight = torch.arange(1, 9).double() / 4.5
    moved = 0.01 * (weight[:4].mean() + weight[4:].mean())
    assert measure(s, options)["max_loss"] == pytest.approx(
        float(3 + (SLOPE * (W.abs() + moved * SLOPE)).sum()), rel=1e-12
    )
    # two batches a step: their gradients add up
    summed = Options(**{**options.model_dump(), "variant": "juneja"})
    assert measure(s, summed)["max_loss"] == pytest.approx(
        float(3 + (SLOPE * (W.abs() + 2 * moved * SLOPE)).sum()), rel=1e-12
    )


def test_the_best_loss_on_the_way_counts_and_juneja_takes_the_last():
    """A bump the ascent overshoots: |z| <= 1, loss -|w - 0.5| steps from 0 to 1 and back to 0.2."""
    w, b = torch.zeros(1, 1), torch.zeros(1)
    s = subject(w, b, lambda w, b: 4.0 - (w - 0.5).abs().sum() + 0 * b.sum(), rows=2, micro_batch=1)
    step = 0.8 / (2 / 3)  # the first row's weight is 2/3
    best = measure(s, Options(epsilon=1.0, lr=step, batch=1, accumulation=1))
    last = measure(s, Options(epsilon=1.0, lr=step, batch=1, accumulation=1, variant="juneja"))
    assert best["max_loss"] == pytest.approx(3.7) and best["value"] == pytest.approx(
        100 * 0.2 / 4.5
    )
    assert last["max_loss"] == pytest.approx(4.0 - 1.3) and last["value"] < 0


def test_juneja_keeps_the_sign_of_the_weight_in_the_box():
    """w = -0.5: half side epsilon (w + 1) = 0.5 epsilon, not 1.5 epsilon."""
    s = subject(torch.full((1, 1), -0.5), torch.zeros(1), lambda w, b: 5.0 + w.sum() + 0 * b.sum())
    for variant, side in (("paper", 1.5), ("juneja", 0.5)):
        found = measure(s, Options.model_validate({"epsilon": 0.01, "lr": 1.0, "variant": variant}))
        assert found["max_loss"] == pytest.approx(4.5 + 0.01 * side, rel=1e-12)


def test_modes_and_weights_are_as_before():
    modes = []
    s = subject(W, B, lambda w, b: (w.sum() + b.sum()).square())
    s.engine.module.register_forward_hook(
        lambda m, *_: modes.append((m.training, torch.is_grad_enabled()))
    )
    before = s.engine.params().clone()
    measure(s, Options())
    assert set(modes) == {(False, False), (False, True)}
    modes.clear()
    measure(s, Options(variant="juneja"))
    assert set(modes) == {(False, False), (True, True)}
    assert s.engine.module.training and before.equal(s.engine.working())
    assert all(p.grad is None for p in s.engine.module.parameters())


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_row_is_run_once_on_one_rank(world):
    ranks = [
        Subject(SimpleNamespace(rank=r, world_size=world), None, None, 11, 2).share(3, 11)
        for r in range(world)
    ]  # type: ignore[arg-type]
    assert len({len(share) for share in ranks}) == 1
    assert sorted(i for share in ranks for rows, weight in share if weight for i in rows) == list(
        range(3, 11)
    )


def test_random_numbers_do_not_depend_on_where_they_are_cut():
    whole = normal("a/w", 0, 2 * BLOCK + 100)
    assert torch.equal(
        torch.cat(
            [normal("a/w", 0, 7), normal("a/w", 7, BLOCK), normal("a/w", BLOCK + 7, BLOCK + 93)]
        ),
        whole,
    )
    assert not torch.equal(normal("a/b", 0, 7), whole[:7]) and normal("a/w", 5, 0).shape == (0,)
    assert abs(float(whole.mean())) < 0.02 and abs(float(whole.std()) - 1) < 0.02


def report(algorithm: str, **values: float) -> dict[str, Any]:
    domains = {name: {"sharpness": {"value": value}} for name, value in values.items()}
    return {"algorithm": algorithm, "train_domains": ["en"], "domains": domains}


def test_table_6_from_reports():
    runs = [report("sam", en=en, fr=2 * en, sw=-en + 9) for en in (1.0, 2.0, 4.0)] + [
        report("asam", en=3.0, fr=5.0)
    ]
    rows = transfer(
        [
            *runs,
            {
                "algorithm": "mesa",
                "train_domains": ["en"],
                "domains": {"en": {"cka": {"value": 1.0}}},
            },
        ],
        "sharpness",
    )
    assert list(rows) == ["sam", "asam"]
    sam = rows["sam"]
    assert sam.runs == 3 and sam.in_domain == pytest.approx(7 / 3)
    means = torch.tensor([14 / 3, 9 - 7 / 3])
    assert sam.zero_shot == pytest.approx(
        float(means.mean())
    ) and sam.zero_shot_std == pytest.approx(float(means.std()), rel=1e-6)
    assert sam.pearson == pytest.approx(1.0)  # the average is en / 2 + 4.5
    assert sam.pearson_std == pytest.approx(2**0.5)  # +1 with fr, -1 with sw
    assert rows["asam"].pearson is None and rows["asam"].zero_shot == 5.0
    assert pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    with pytest.raises(ValueError, match="training domain"):
        transfer([report("sam", fr=1.0)], "sharpness")


def test_settings_and_names_are_checked():
    rest, settings = split_overrides(
        ["train.seed=3", "sharpness.epsilon=1e-4", "cka.pooling=mean", "task.seq_len=8"]
    )
    assert rest == ["train.seed=3", "task.seq_len=8"]
    assert settings.sharpness.epsilon == 1e-4 and settings.cka.pooling == "mean"
    with pytest.raises(ValueError, match=r"epsilom.*did you mean 'epsilon'"):
        split_overrides(["sharpness.epsilom=1"])
    with pytest.raises(ValueError, match="did you mean 'hessian'"):
        names("cka,hesian")

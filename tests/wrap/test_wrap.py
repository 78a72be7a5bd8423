"""What wrap() refuses, by name, and with a way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.parity import problem
from tram_ds.algorithms.stepper import wrap
from tram_ds.models.output import Output


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_half_precision_parameters_are_refused() -> None:
    model = problem.model().bfloat16()
    with pytest.raises(
        ValueError, match=r"transformer.wte.weight is torch.bfloat16.*model.dtype: bfloat16"
    ):
        wrap(model, sgd(model))


def test_a_model_needs_its_optimizer() -> None:
    with pytest.raises(ValueError, match="optimizer="):
        wrap(problem.model())


def test_not_a_model() -> None:
    with pytest.raises(ValueError, match="cannot wrap a dict"):
        wrap({})


def test_unknown_algorithm_and_option() -> None:
    model = problem.model()
    with pytest.raises(ValueError, match=r"^algorithm.name = 'tram': unknown name.*tram_prev"):
        wrap(model, sgd(model), "tram")
    with pytest.raises(ValueError, match="sigmo"):
        wrap(model, sgd(model), "tram_x", sigmo=1.0)


def test_no_micro_batches() -> None:
    model = problem.model()
    with pytest.raises(ValueError, match="at least one micro-batch"):
        wrap(model, sgd(model)).step([], problem.forward)


def test_noise_needs_an_embedding_or_a_site() -> None:
    """A plain module has no get_input_embeddings: the error says what to pass, and passing it
    works."""

    def forward(model: Any, batch: Any) -> Output:
        logits = model(batch)
        return Output(logits.square().sum(), len(batch), logits)

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="noise_site="):
        wrap(model, sgd(model), "tram_x").step([torch.ones(2, 3)], forward)
    report = wrap(model, sgd(model), "tram_x", noise_site=model[0]).step(
        [torch.ones(2, 3)], forward
    )
    assert float(report.distance) > 0.0


def test_fsdp1_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    old = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(old)
    with pytest.raises(ValueError, match="FSDP1"):
        wrap(old, SimpleNamespace())  # type: ignore[arg-type]


def test_every_target_ignored_is_a_step_of_nothing() -> None:
    """No counted target in the whole batch: gradient 0, no NaN, weights unchanged under SGD."""

    def forward(model: Any, batch: Any) -> Output:
        out = problem.forward(model, batch)
        return Output(out.loss_sum * 0.0, 0, out.logits)

    model = problem.model()
    before = [p.detach().clone() for p in model.parameters()]
    report = wrap(model, sgd(model), "asam").step([problem.batch(0, 0)], forward)
    assert not report.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_public_names_are_what_they_say_whatever_was_imported_before() -> None:
    import tram_ds
    import tram_ds.algorithms.stepper
    import tram_ds.training.run

    assert tram_ds.wrap is wrap
    assert tram_ds.Stepper is tram_ds.algorithms.stepper.Stepper
    assert tram_ds.Output is Output
    with pytest.raises(AttributeError, match="no attribute 'wrapp'"):
        _ = tram_ds.wrapp

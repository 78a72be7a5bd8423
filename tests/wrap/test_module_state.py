"""Every buffer ends a step as pass 1 left it; a skipped step, or one that raised, leaves all as
before."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.wrap.hand import agree, batches, forward, frozen_copy, mlp, sgd
from tram_ds.algorithms.stepper import wrap
from tram_ds.checkpoint import tensors
from tram_ds.checkpoint.resume import Saver

CLOSE = 2e-6


class Codes(nn.Module):
    """Remembers a mean by binding a new buffer, counts with an integer one, writes through .data:
    three ways of having state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.calls += 1
        self.last.data.copy_(x.detach()[0])
        return x - self.mean


class Checkpointed(nn.Module):
    """`inner`, computed again in backward, which moves running statistics once more."""

    def __init__(self, inner: nn.Module, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Signal(nn.Module):
    """(N, 8) -> (N, 8) through a norm over (N, 2, 4) signals."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(-1, 2, 4)).flatten(1)


def spectral(legacy: bool) -> nn.Module:
    torch.manual_seed(5)
    make = nn.utils.spectral_norm if legacy else parametrizations.spectral_norm
    return make(nn.Linear(8, 8))


def large() -> nn.Module:
    """More elements than are copied unasked."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 1 << 15), nn.BatchNorm1d(1 << 15), nn.AvgPool1d(1 << 12))


LAYERS = {
    "batch_norm": lambda: nn.BatchNorm1d(8),
    "batch_norm_momentum_none": lambda: nn.BatchNorm1d(8, momentum=None),
    "instance_norm": lambda: Signal(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)),
    "spectral_norm": lambda: spectral(False),
    "spectral_norm_legacy": lambda: spectral(True),
    "codes": Codes,
    "large": large,
    "checkpointed": lambda: Checkpointed(nn.BatchNorm1d(8), False),
    "checkpointed_reentrant": lambda: Checkpointed(nn.BatchNorm1d(8), True),
    "compiled": lambda: torch.compile(nn.BatchNorm1d(8), backend="eager"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_buffers_end_as_pass_1_left_them(name: str) -> None:
    """One micro-batch: by hand all are differentiated at once, here one after the other, which
    shows in checkpointed statistics."""
    assert agree(lambda: mlp(LAYERS[name]()), data=batches(1)) < CLOSE


class Scales(nn.Module):
    """Its state is a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(2.0)
        return x * self.scale


def test_a_frozen_parameter_that_forward_writes_is_state_too() -> None:
    model = mlp(Scales())
    wrap(model, sgd(model), "sam").step(batches(2), forward)
    assert torch.equal(model[1].scale, torch.full((8,), 4.0)), "two micro-batches, pass 1 alone"


@pytest.mark.parametrize("name", ["batch_norm", "spectral_norm", "codes"])
@pytest.mark.parametrize("row", ["tram_prev", "tram_x", "tram_fisher", "r3f", "trpo", "mesa"])
def test_a_reference_leaves_no_trace(name: str, row: str) -> None:
    """Reference and noise passes in train mode: the buffers are those of the same step without
    them, which is pass 1 of the plain step."""
    options: dict[str, Any] = {"tram_prev": {"reference_mode": "paired"}}.get(row, {})
    found = []
    for algorithm, chosen in ((row, options), ("base", {})):
        model = mlp(LAYERS[name]())
        site = {"noise_site": model[0]} if row in ("tram_x", "tram_fisher", "r3f") else {}
        site = site if algorithm == row else {}
        stepper = wrap(
            model, torch.optim.SGD(model.parameters(), lr=0.0), algorithm, **chosen, **site
        )
        for _ in range(2):
            stepper.step(batches(), forward)
        found.append({k: v for k, v in model.named_buffers()})
    same = found[0]
    if row == "tram_fisher":  # its pass 1 is on x + z, whose statistics it leaves
        assert all(v.isfinite().all() for v in same.values() if v.is_floating_point())
    else:
        assert all(torch.equal(v, found[1][k]) for k, v in same.items())


class Explodes(nn.Module):
    """Infinite, or an error, in the call of number `at`."""

    def __init__(self, at: int, error: type[BaseException] | None = None):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls != self.at:
            return x
        if self.error is not None:
            raise self.error("out of memory")
        return x * float("inf")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


@pytest.mark.parametrize("at", [3, 4], ids=["pass_1", "pass_2"])
@pytest.mark.parametrize("layer", ["batch_norm", "codes"])
def test_a_skipped_step_leaves_every_buffer_as_before(at: int, layer: str) -> None:
    model = mlp(Explodes(at), LAYERS[layer]())
    stepper = wrap(model, adamw(model), "sam")
    assert not stepper.step(batches(1), forward).skipped
    before = frozen_copy(model)
    assert stepper.step(batches(1), forward).skipped
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_skipped_step_too_waits_for_a_save_that_runs_beside_it(tmp_path: Path) -> None:
    """Or the next save would gather beside the one before it."""
    model = mlp(Explodes(3))
    stepper = wrap(model, adamw(model), "sam")
    stepper.step(batches(1), forward)
    passes, write = threading.Event(), tensors.write

    def slow(*what: Any) -> None:
        assert passes.wait(60)
        time.sleep(0.3)
        write(*what)

    backward = stepper.engine.backward

    def last(*what: Any, **options: Any) -> Any:
        passes.set()
        return backward(*what, **options)

    with (
        mock.patch.object(tensors, "write", slow),
        mock.patch.object(stepper.engine, "backward", last),
        Saver(tmp_path, stepper) as saver,
    ):
        saved = saver.save(asynchronous=True)
        assert stepper.step(batches(1), forward).skipped
        assert saved.is_dir(), "the step is over and the save is not"


ROWS = {
    "base": {},
    "sam": {},
    "tram_prev": {"reference_mode": "paired"},
    "tram_init": {},
    "mesa": {},
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("row", ROWS)
def test_a_step_that_raised_leaves_no_trace(row: str, error: type[BaseException]) -> None:
    """In whatever pass: what follows is what would have followed without it."""
    found = []
    for at in (0, 5, 6, 7):
        model = mlp(Explodes(0, error), LAYERS["batch_norm"]())
        stepper = wrap(model, adamw(model), row, **ROWS[row])
        for _ in range(2):
            stepper.step(batches(1), forward)
        model[1].calls, model[1].at = 4, at
        try:
            stepper.step(batches(1, seed=9), forward)
            if at:
                continue  # this row has fewer passes
            stepper = None
        except error:
            pass
        if stepper is None:  # the loop in which nothing was raised starts anew
            model = mlp(Explodes(0), LAYERS["batch_norm"]())
            stepper = wrap(model, adamw(model), row, **ROWS[row])
            for _ in range(2):
                stepper.step(batches(1), forward)
        assert all(p.grad is None for p in model.parameters())
        model[1].at = 0
        report = stepper.step(batches(1, seed=4), forward)
        found.append(
            {**model.state_dict(), "d": report.distance, "steps": torch.tensor(stepper.steps)}
        )
    assert len(found) >= 2
    for other in found[1:]:
        assert all(torch.equal(v, other[k]) for k, v in found[0].items())


def test_the_next_step_starts_from_the_weights_that_stand_then() -> None:
    """A user who loads other weights after an error trains those."""
    model, fresh = mlp(Explodes(2, RuntimeError)), mlp(nn.Identity(), seed=3)
    stepper = wrap(model, sgd(model), "sam", rho=0.5)
    with pytest.raises(RuntimeError, match="out of memory"):
        stepper.step(batches(), forward)
    model.load_state_dict(fresh.state_dict())
    stepper.step(batches(), forward)
    wrap(fresh, sgd(fresh), "sam", rho=0.5).step(batches(), forward)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())

"""Tokens per second and MFU: FLOPs derived by hand, a clock that is told the time, and a count that
leaves no trace."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from tram_ds import wrap
from tram_ds.algorithms.stepper import Stepper
from tram_ds.models.chunked import Chunked
from tram_ds.models.logit_chunks import CHUNK_ELEMENTS
from tram_ds.models.pretrained import load_model
from tram_ds.recipe.loading import load
from tram_ds.recipe.model_section import ModelSection
from tram_ds.tasks.causal import next_tokens
from tram_ds.training.throughput import Throughput, device_peak, forward_flops, gpu_peak, throughput

# 6 rows through 8 -> 16 -> 4: a multiplication and an addition per weight
FORWARD = 2 * 6 * 8 * 16 + 2 * 6 * 16 * 4


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))


def forward(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    logits = model(x)
    return logits.square().sum(), len(x), logits


def stepper(model: nn.Module) -> Stepper:
    return wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "tram_prev")


def timed(peak: float | None = None, **known: Any) -> tuple[Throughput, Clock]:
    clock = Clock()
    measured = Throughput(peak, units=lambda step: 7, clock=clock, **known)
    measured.restart()
    return measured, clock


def step(measured: Throughput, clock: Clock, seconds: float, tokens: float) -> None:
    clock.now += seconds
    measured.add(0, torch.tensor(tokens, dtype=torch.float64))


def test_tokens_of_every_step_count_and_the_time_of_a_validation_does_not() -> None:
    measured, clock = timed()
    for tokens in (100, 200, 300):  # train.log_every: 3
        clock.now += 50.0
        measured.restart()
        step(measured, clock, 2.0, tokens)
    step(measured, clock, 1.0, 100)
    assert measured.rates() == {"tokens_per_second": 700 / 7.0}
    step(measured, clock, 0.5, 80)
    assert measured.rates() == {"tokens_per_second": 160.0}
    assert measured.rates() == {}, "no step, no rate"


def test_waiting_for_the_device_is_part_of_the_steps() -> None:
    class Waiting(torch.Tensor):
        def __float__(self) -> float:
            clock.now += 3.0
            return 8.0

        def __radd__(self, _: float) -> Waiting:
            return self

    measured, clock = timed()
    clock.now += 1.0
    measured.add(0, torch.zeros(()).as_subclass(Waiting))
    assert measured.rates() == {"tokens_per_second": 2.0}


def test_mfu_is_model_flops_over_what_the_device_could_do() -> None:
    measured, clock = timed(peak=1e6)
    measured.count(stepper(toy()), forward, [torch.ones(6, 8), torch.ones(6, 8)])
    assert measured.flops == FORWARD * 2
    for _ in range(2):
        step(measured, clock, 0.25, 12)
    assert measured.rates() == {
        "tokens_per_second": 48.0,
        "mfu": pytest.approx(FORWARD * 7 * 2 / (0.25 * 1e6)),
    }


def test_an_mfu_above_one_is_left_out_and_said_once() -> None:
    measured, clock = timed(peak=7e12, flops=4e12)
    with pytest.warns(UserWarning, match=r"mfu = 2 is above 1.*7 TFLOP/s.*set train.peak_tflops"):
        step(measured, clock, 2.0, 10)
        assert measured.rates() == {"tokens_per_second": 5.0}
    other, other_clock = timed(peak=7e12, flops=4e12, rank=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(measured, clock, 2.0, 10)
        step(other, other_clock, 2.0, 10)
        assert measured.rates() == other.rates() == {"tokens_per_second": 5.0}
    step(measured, clock, 4.0, 10)
    assert measured.rates()["mfu"] == 1.0


def test_without_a_peak_nothing_is_counted() -> None:
    measured, clock = timed(peak=None)
    measured.count(stepper(toy()), lambda *_: pytest.fail("a forward pass"), [torch.ones(6, 8)])
    step(measured, clock, 1.0, 1)
    assert "mfu" not in measured.rates()


def test_counting_leaves_no_trace() -> None:
    model, random = toy(), torch.random.get_rng_state()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert (
        forward_flops(stepper(model), forward, [torch.randn(6, 8, generator=torch.Generator())])
        == FORWARD
    )
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


ROWS, LENGTH, WIDTH, LAYERS, VOCABULARY = 2, 16, 32, 3, 61
# Per block and token 12 width^2 weights, and attention's two products over all positions; then the
# head.
TRANSFORMER = (
    2 * ROWS * LENGTH * (LAYERS * (12 * WIDTH**2 + 2 * LENGTH * WIDTH) + WIDTH * VOCABULARY)
)
BATCH = {"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.long)}


def gpt2(**options: Any) -> nn.Module:
    init = {
        "architecture": "gpt2",
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": 2,
        "vocab_size": VOCABULARY,
    }
    special = {"n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
    return load_model(AutoModelForCausalLM, ModelSection(init=init | special, **options))


def whole(model: Any, batch: Any) -> tuple[torch.Tensor, int, torch.Tensor]:
    logits = model(**batch).logits.flatten(0, 1)
    return logits.sum(), len(logits), logits


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": True}, {"compile": True}, {"attention": "eager"}],
    ids=str,
)
def test_a_transformer_counts_the_same_however_it_runs(options: dict[str, Any]) -> None:
    counters.clear()
    assert forward_flops(stepper(gpt2(**options)), whole, [BATCH]) == TRANSFORMER
    assert not counters["stats"], "counting compiles nothing"


def test_logits_in_chunks_count_as_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    chunked = Chunked(lambda batch: batch, next_tokens)
    assert forward_flops(stepper(gpt2()), chunked, [BATCH]) == TRANSFORMER


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.0),
        ("NVIDIA H200", "float32", 67.0),
        ("NVIDIA H100 PCIe", "bfloat16", None),  # slower than the one whose peak is known
        ("NVIDIA H200 NVL", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float32", None),
    ],
)
def test_a_peak_is_only_taken_for_the_gpu_it_belongs_to(
    name: str, dtype: str, tflops: float | None
) -> None:
    assert gpu_peak(name, dtype) == (None if tflops is None else tflops * 1e12)


def test_a_recipe_gives_the_peak_where_the_device_does_not() -> None:
    assert device_peak(torch.device("cpu"), "float32") is None
    assert throughput(load("quickstart"), stepper(toy())).peak is None
    assert throughput(load("quickstart", ["train.peak_tflops=1.5"]), stepper(toy())).peak == 1.5e12


def test_a_step_that_does_not_climb_is_worth_less() -> None:
    model = toy()
    every_third = wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), "tram_prev", perturb_every=3
    )
    assert [throughput(load("quickstart"), every_third).units(step) for step in range(4)] == [
        7,
        3,
        3,
        7,
    ]

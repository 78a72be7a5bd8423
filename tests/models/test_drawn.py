"""A fresh model whose weights are drawn one at a time is the one that building it whole makes, bit
for bit, and leaves the generator where that does; what cannot be drawn so is said, never
guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from tram_ds.models import drawn
from tram_ds.models.architecture import tiny
from tram_ds.models.drawn import KEPT, NotDrawn
from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.recipe.model_section import LoraSection, ModelSection
from tram_ds.runtime.errors import DataError

CAUSAL, CLASSES = AutoModelForCausalLM, AutoModelForSequenceClassification
IMAGES = AutoModelForImageClassification
# GPT-2 scales some weights by depth, Mamba computes its own, Mixtral has experts in one tensor,
# XLM-R's embedding has a row of zeros, ViT and DINOv2 have parameters outside of layers
CASES = [
    ("gpt2", CAUSAL),
    ("llama", CAUSAL),
    ("gemma", CAUSAL),
    ("gpt_neox", CAUSAL),
    ("opt", CAUSAL),
    ("mamba", CAUSAL),
    ("mixtral", CAUSAL),
    ("xlm-roberta", CLASSES),
    ("deberta-v2", CLASSES),
    ("vit", IMAGES),
    ("dinov2", IMAGES),
]


def section(kind: str, **more: Any) -> ModelSection:
    small = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2}}
    if kind in ("deberta-v2", "mamba"):
        more["attention"] = "eager"  # they have no other
    vocabulary = {} if kind in ("vit", "dinov2") else {"vocab_size": 90}
    return ModelSection(init={**tiny(kind), **small.get(kind, {}), **vocabulary}, **more)


@pytest.mark.parametrize("kind, auto", CASES)
def test_every_weight_is_what_the_whole_model_has(kind: str, auto: Any) -> None:
    whole: Any = load_model(auto, section(kind), seed=3)
    left: Any = load_stored(auto, section(kind), seed=3)
    assert not hasattr(left, "loaded_whole") and left.new_weights == whole.new_weights
    values = dict(whole.named_parameters())
    assert [n for n, _ in left.named_parameters()] == list(values), "ties too"
    large = {n for n, p in values.items() if p.dim() > 1 and p.numel() > 1000}
    assert large <= {n for n, p in left.named_parameters() if p.is_meta}
    for name, p in values.items():
        flat = p.detach().flatten()
        for start, stop in ((0, len(flat)), (len(flat) // 3, len(flat) // 2)):
            into = torch.empty(stop - start)
            left.stored.read(name, start, into)
            assert torch.equal(into, flat[start:stop]), (name, start, stop)
    buffers = dict(left.named_buffers())
    assert list(buffers) == [n for n, _ in whole.named_buffers()]
    for name, buffer in whole.named_buffers():
        assert type(buffers[name]) is torch.Tensor and buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name


def drawn_and_whole(kind: type[nn.Module]) -> tuple[dict[str, Any], nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        whole, after = kind(), torch.rand(2)
        torch.manual_seed(7)
        _, draws = drawn.build(kind)
        assert torch.equal(torch.rand(2), after), "the generator is where it would be"
    return draws, whole


class Written(nn.Module):
    """Every kind of write: by parts, over others, from computed values and from other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(6, 4))
        self.cut = nn.Parameter(torch.empty(40, 33))
        self.square = nn.Parameter(torch.empty(5, 5))
        self.after = nn.Parameter(torch.empty(4))
        self.turned = nn.Parameter(torch.empty(3, 7).t())
        with torch.no_grad():
            nn.init.normal_(self.rows)
            self.rows[2].zero_()
            self.rows[:, 1:3].uniform_(-1, 1)
            self.rows.mul_(2).add_(torch.arange(4.0))
            nn.init.trunc_normal_(self.cut, std=1.0, a=-0.5, b=0.5)
            nn.init.orthogonal_(self.square)
            self.after.data.copy_(self.rows[0])
            if self.after.sum().item() > -1e9:  # a value that decides
                self.after.data[1:] += torch.rand(3)
            nn.init.kaiming_uniform_(self.turned)
            self.rows[5].fill_(1.0)


def test_writes_of_every_kind_are_played_again() -> None:
    draws, whole = drawn_and_whole(Written)
    assert set(draws) == {n for n, _ in whole.named_parameters()}
    for name, p in whole.named_parameters():
        value = draws[name].value()
        assert torch.equal(value, p) and value.stride() == p.stride(), name
    state = torch.get_rng_state()
    draws["rows"].value()
    assert torch.equal(torch.get_rng_state(), state)


class Twice(nn.Module):
    """A layer's own initialisation, then transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        nn.init.normal_(self.layer.weight)


def test_what_was_overwritten_is_not_kept() -> None:
    draws, _ = drawn_and_whole(Twice)
    assert len(draws["layer.weight"].script.draws) == 1


class ByList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3))
        torch._foreach_zero_([self.w.data])


class AsIntegers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3))
        self.w.data.view(torch.int32).zero_()


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3))
        self.parts = {"first": self.w[:2]}


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3).normal_(generator=torch.Generator().manual_seed(1)))


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(KEPT // 4 + 1))


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(3, 2))
        self.w.data.t_()


@pytest.mark.parametrize(
    "kind, said",
    [
        (ByList, "_foreach_zero_.* writes to more than its first argument"),
        (AsIntegers, "sees a weight as another dtype"),
        (Beside, r"Beside\.parts holds weights beside its parameters"),
        (OwnGenerator, "a generator of its own"),
        (Computed, "computes more than 64 MiB of its weights"),
        (Reshaped, "calls aten.t_"),
    ],
)
def test_what_cannot_be_drawn_alone_is_named(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(NotDrawn, match=said):
        drawn.build(kind)


def test_a_model_that_needs_its_weights_whole_is_drawn_whole_and_said_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(drawn, "KEPT", 100)
    whole: Any = load_model(CAUSAL, section("llama"), seed=3)
    left: Any = load_stored(CAUSAL, section("llama"), seed=3)
    assert left.loaded_whole.startswith("model.init is drawn whole on every rank: its init")
    assert not hasattr(left, "stored")
    for one, two in zip(whole.parameters(), left.parameters(), strict=True):
        assert torch.equal(one, two)


def test_dora_needs_its_base_whole() -> None:
    pytest.importorskip("peft")
    left: Any = load_stored(CAUSAL, section("llama", lora=LoraSection(r=2, dora=True)))
    assert "model.lora.dora begins with the norms" in left.loaded_whole


@pytest.mark.parametrize("load", (load_model, load_stored))
def test_a_config_that_makes_no_model_is_named(load: Any) -> None:
    wrong = ModelSection(init={"architecture": "gpt2", "n_embd": 10, "n_head": 3, "n_layer": 1})
    with pytest.raises(DataError, match=r"cannot build 'init: .*n_embd"):
        load(CAUSAL, wrong)

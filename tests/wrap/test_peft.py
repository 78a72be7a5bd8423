"""PEFT models through wrap(): theta is the adapters that train now, the base stays bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.wrap.hand import RHO, gap, sam_step
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.stepper import wrap
from tram_ds.algorithms.table import ALGORITHMS

peft = pytest.importorskip("peft", reason="peft is not installed")


def config() -> Any:
    return peft.LoraConfig(
        r=4, target_modules=["c_attn"], lora_dropout=0.0, init_lora_weights="gaussian"
    )


def adapted() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_cache": False}
    return peft.get_peft_model(GPT2LMHeadModel(GPT2Config(**small, **still)), config())


def ids(seed: int = 1) -> Tensor:
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(seed))


def forward(model: Any, ids: Tensor) -> tuple[Tensor, int, Tensor]:
    z = model(input_ids=ids).logits
    loss = F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return loss, ids[:, 1:].numel(), z


def sgd(model: Any, momentum: float = 0.0) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.5, momentum=momentum)


def test_theta_0_is_the_model_with_its_adapters_off() -> None:
    """d of tram_init is KL(adapters off, adapters on), computed here in float64."""
    model = adapted()
    # peft begins with B = 0: off and on are the same model
    adapters = [p for p in model.parameters() if p.requires_grad]
    stepper, measured = wrap(model, torch.optim.SGD(adapters, lr=5.0), "tram_init"), []
    for _ in range(3):
        with torch.no_grad():
            on = model(input_ids=ids()).logits.double().log_softmax(-1)
            with model.disable_adapter():
                off = model(input_ids=ids()).logits.double().log_softmax(-1)
        kl = float((off.exp() * (off - on)).sum(-1).mean())
        measured.append(kl)
        d = float(stepper.step([ids()], forward).distance)
        assert d == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert measured[-1] > 1e-4


@pytest.mark.parametrize("row", ALGORITHMS)
def test_every_row_trains_the_adapters_and_leaves_the_base(row: str) -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepper = wrap(model, sgd(model, momentum=0.9 if row == "msam" else 0.0), row)
    for _ in range(2):
        stepper.step([ids()], forward)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name
        assert p.grad is None or "lora_" in name


def test_an_adapter_added_and_switched_later_is_followed() -> None:
    ours, theirs = adapted(), adapted()
    hand, wrapped = sgd(ours), sgd(theirs)
    stepper = wrap(theirs, wrapped, "sam", rho=RHO)

    def switch(model: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
        if name not in model.peft_config:
            torch.manual_seed(7)
            model.add_adapter(name, config())
            new = [p for n, p in model.named_parameters() if f".{name}." in n]
            optimizer.add_param_group({"params": new})
        model.set_adapter(name)

    for step, name in enumerate(["default", "second", "second", "default"]):
        for model, optimizer in ((ours, hand), (theirs, wrapped)):
            switch(model, optimizer, name)
        still = {n: p.detach().clone() for n, p in theirs.named_parameters() if name not in n}
        sam_step(ours, hand, [ids(step)], forward)
        stepper.step([ids(step)], forward)
        assert gap(ours, theirs) < 1e-6
        assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in still.items())


def test_an_adapter_that_the_optimizer_does_not_have_is_refused() -> None:
    model = adapted()
    stepper = wrap(model, sgd(model), "sam", rho=RHO)
    model.add_adapter("second", config())
    model.set_adapter("second")
    with pytest.raises(ValueError, match="optimizer"):
        stepper.step([ids()], forward)


class Quantised(torch.nn.Module):
    """Codes of 8 bits, whose scale is a buffer, under an adapter: x (q / 100)' + x a' b'."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        codes = torch.randint(-100, 100, (32, 16), dtype=torch.int8, generator=g)
        base = codes if weight is None else weight
        self.q = torch.nn.Parameter(base, requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.01 if weight is None else 1.0))
        self.a = torch.nn.Parameter(torch.randn(4, 16, generator=g) / 4)
        self.b = torch.nn.Parameter(torch.randn(32, 4, generator=g) / 4)
        self.entry = torch.nn.Identity()  # where noise is added

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return x @ (self.q.float() * self.scale).T + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("row", ALGORITHMS)
def test_a_quantised_base_is_the_same_base_in_floats(row: str) -> None:
    codes = Quantised()
    floats = Quantised(codes.q.float() * 0.01)
    kept, ends = codes.q.detach().clone(), []
    for model in (codes, floats):
        site = {"noise_site": model.entry} if _noised(row) else {}
        built = wrap(model, sgd(model, momentum=0.9), row, **site)
        for step in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            built.step([x], lambda m, x: _scored(m(x)))
        ends.append([p.detach().clone() for p in (model.a, model.b)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*ends, strict=True))
    assert torch.equal(codes.q, kept) and codes.q.dtype == torch.int8


def _noised(row: str) -> bool:
    parts = algorithm(row).parts.values()
    return any("noise_site" in type(part).model_fields for part in parts)


def _scored(logits: Tensor) -> tuple[Tensor, int, Tensor]:
    targets = torch.arange(len(logits))
    return F.cross_entropy(logits, targets, reduction="sum"), len(logits), logits

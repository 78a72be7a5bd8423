"""Logits in chunks give what whole logits give, on the architectures people fine-tune, and no (N,
C) tensor is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from tram_ds.algorithms.distance import kl_forward
from tram_ds.models import logit_chunks, logits
from tram_ds.models.chunked import Chunked, chunkable
from tram_ds.models.output import Output
from tram_ds.tasks.causal import next_tokens

C, H, T = 61, 16, 12
SMALL = {
    "vocab_size": C,
    "hidden_size": H,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "use_cache": False,
}
KINDS = ["gpt2", "llama", "mistral", "qwen2", "opt", "gpt_neox", "phi", "gpt_neo"]
OWN = {
    "gpt_neo": {"attention_types": [[["global"], 1]], "num_layers": 1, "num_heads": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": H},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    renamed = {known.attribute_map.get(key, key): value for key, value in SMALL.items()}
    config = AutoConfig.for_model(kind, **{**renamed, **OWN.get(kind, {})})
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, C, (3, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def whole(m: Any, b: dict[str, torch.Tensor]) -> Output:
    found = m(**b).logits[b["attention_mask"].bool()]
    targets = next_tokens(b)
    loss = torch.nn.functional.cross_entropy(
        found.float(), targets, ignore_index=logit_chunks.IGNORED, reduction="sum"
    )
    return Output(
        loss,
        (targets != logit_chunks.IGNORED).sum(),
        found,
        rows=3,
        counted=targets != logit_chunks.IGNORED,
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logit_chunks.CHUNK_ELEMENTS, "cpu", 7 * C)


@pytest.mark.parametrize(
    "options", [{}, {"labelled": True}, {"official": True}], ids=("all", "labelled", "official")
)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_distance_and_gradient(kind: str, options: dict[str, bool]) -> None:
    """With a penalty of weight 0.7, whose gradient flows into the current prediction."""
    m, b, forward = model(kind), batch(), Chunked(lambda b: b, next_tokens)
    assert chunkable(m)
    with torch.no_grad():
        reference = forward.predict(m, b, copy_head=True)
        assert (
            reference.weight is not None
            and reference.weight is not m.get_output_embeddings().weight
        )
        teacher = torch.nn.functional.linear(reference.states, reference.weight, reference.bias)
        for p in m.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    weight = lambda count, positions: 0.7 * count / positions  # noqa: E731
    want = logits.measured(
        whole(m, b), [logits.Compare(kl_forward, teacher, weight=weight, **options)]
    )
    got = forward(m, b, [logits.Compare(kl_forward, reference, weight=weight, **options)])
    for key in ("objective", "loss_sum"):
        assert float(getattr(got, key).detach()) == pytest.approx(
            float(getattr(want, key).detach()), rel=1e-5
        ), key
    assert float(got.distances[0][0]) == pytest.approx(
        float(want.distances[0][0].detach()), rel=1e-4
    )
    assert int(got.distances[0][1]) == int(want.distances[0][1])
    assert want.objective is not None and got.objective is not None
    gradients = [
        torch.autograd.grad(o, list(m.parameters()), allow_unused=True)
        for o in (want.objective, got.objective)
    ]
    for a, c in zip(*gradients, strict=True):
        assert (a is None) is (c is None)
        assert (
            a is None
            or c is None
            or torch.allclose(a, c, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
        )


def test_capped_logits_are_refused_with_the_key_that_helps() -> None:
    with pytest.raises(ValueError, match=r"model\.logits: whole"):
        Chunked(lambda b: b, next_tokens)(model("gemma2"), batch())


def test_an_objective_can_be_differentiated_once() -> None:
    m = model("gpt2")
    loss = Chunked(lambda b: b, next_tokens)(m, batch()).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="differentiated once"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made inside whose last dimension is the vocabulary, the head's
    own views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            t.numel()
            for t in tree_leaves(out)
            if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == C != t.numel() / H
        ]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tensor_is_larger_than_a_chunk() -> None:
    m, b, forward = model("llama"), batch(), Chunked(lambda b: b, next_tokens)
    with Largest() as seen, torch.no_grad():
        whole(m, b)
    assert seen.elements >= 30 * C
    with Largest() as seen:
        forward(
            m, b, [logits.Compare(kl_forward, forward.predict(m, b, copy_head=True))]
        ).loss_sum.backward()
    assert seen.elements == 7 * C

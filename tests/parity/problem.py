"""The parity problem: a tiny GPT-2 with tied embeddings and odd sizes, and batches whose token
counts are uneven."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from tram_ds.models import adapters, logit_chunks
from tram_ds.models.chunked import Chunked
from tram_ds.models.output import Output
from tram_ds.recipe.model_section import LoraSection, ModelSection
from tram_ds.tasks.causal import next_tokens

SEED, STEPS, LR = 5, 3, 0.05
LR_OF_ADAPTERS = 0.5  # so that they, too, go somewhere in three steps
# d of a 3-step toy run is ~1e-3: at its natural size a broken norm would hide below 1e-6, so the
# radius is scaled.
SCALED = {"tram_prev": 20.0, "tram_init": 10.0, "tram_x": 25.0}
OPTIONS = {name: {"radius_scale": scale} for name, scale in SCALED.items()} | {
    "trpo": {"weight": 2.0},
    "asam_trpo": {"weight": 2.0},
    "mesa": {"weight": 2.0, "decay": 0.7},
    "asam_mesa": {"weight": 2.0, "decay": 0.7},
    "kl_init": {"weight": 2.0},
    "l2sp": {"pull": 4.0},
    "msam": {"rho": 0.5},
    "rwp": {"weight_sigma": 0.3},
    "r3f": {"weight": 2.0},
    "asam_r3f": {"weight": 2.0},
    "fsam": {"rho": 0.5, "eta": 50.0},
    "functional_sam": {"rho": 0.3},
    "tram_fisher": {"rho": 0.5, "eta": 50.0},
}


# a large eps, so that elements whose gradient is nearly 0 do not move by their rounding alone
ADAM = {"betas": (0.8, 0.9), "eps": 0.2}


def adam(parameters: Any) -> torch.optim.Optimizer:
    """For a row that reads its second moments."""
    return torch.optim.Adam(parameters, lr=LR, **ADAM)


def optimizer(row: str, lr: float = LR) -> Callable[[Any], torch.optim.Optimizer]:
    """SGD, with momentum for the row that needs one."""
    momentum = 0.9 if row == "msam" else 0.0
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def model(dropout: float = 0.0, tied: bool = True) -> GPT2LMHeadModel:
    """fp32; vocabulary 19 and width 10 divide by nothing, so every sharded engine pads."""
    torch.manual_seed(0)
    drop = {name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    size = {
        "vocab_size": 19,
        "n_positions": 12,
        "n_embd": 10,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = GPT2Config(
        **size,
        **drop,
        initializer_range=0.3,
        use_cache=False,
        attn_implementation="eager",
        tie_word_embeddings=tied,
    )
    gpt2 = GPT2LMHeadModel(config).train()
    # a nonzero start everywhere: T = |theta| must not freeze a bias at 0
    for name, p in gpt2.named_parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return gpt2


def adapted() -> GPT2LMHeadModel:
    """model() with adapters as a recipe adds them; B is not zero either. Rank 3 divides by nothing,
    so that the second of two ranks has less of an A, or none."""
    lora = LoraSection(r=3, alpha=3.0, targets=["c_attn"])
    gpt2, section = model(), ModelSection(init={"architecture": "gpt2"}, lora=lora)
    adapters.add(gpt2, section, seed=1)
    for name, p in gpt2.named_parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return gpt2


def batch(step: int, micro: int) -> dict[str, torch.Tensor]:
    """Global micro-batch `micro` of `step`: 3 rows, the second padded; lengths and so counts differ
    between micro-batches."""
    g = torch.Generator().manual_seed(1000 * step + micro)
    length, padding = 6 + (3 * step + micro) % 4, (micro + step) % 3
    ids = torch.randint(0, 19, (3, length), generator=g)
    mask = torch.ones(3, length, dtype=torch.long)
    if padding:
        mask[1, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def chunked_forward() -> Chunked:
    """`forward` without whole logits; where `few_rows` holds, 5 rows at a time."""
    return Chunked(lambda b: b, next_tokens)


def few_rows() -> Any:
    """Decorates a function, in which chunks have 5 rows, so that these small batches have several.
    Put back afterwards, because what other tests of the process plan has a chunk's real size."""
    return mock.patch.dict(logit_chunks.CHUNK_ELEMENTS, cpu=5 * 19, cuda=5 * 19)


def forward(m: torch.nn.Module, b: dict[str, torch.Tensor]) -> Output:
    logits = m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
    valid = b["attention_mask"].bool()
    counted = valid[:, 1:]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(wide[:, :-1][counted], b["input_ids"][:, 1:][counted], reduction="sum")
    return Output(loss, counted.sum(), logits[valid], rows=3)


def counts(b: dict[str, torch.Tensor]) -> tuple[int, int]:
    return int(b["attention_mask"][:, 1:].sum()), int(b["attention_mask"].sum())


def global_batches(
    steps: int = STEPS, micros: int = 4, device: torch.device | str = "cpu"
) -> list[list[dict[str, torch.Tensor]]]:
    def there(t: int, j: int) -> dict[str, torch.Tensor]:
        return {key: value.to(device) for key, value in batch(t, j).items()}

    return [[there(t, j) for j in range(micros)] for t in range(steps)]


def double(m: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(m).double()

"""Who runs: ours on one engine, and the plain loops that do the same work without us. All share one
model, batch and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.stepper import Stepper
from tram_ds.engines import choose as engines
from tram_ds.engines.protocol import Engine
from tram_ds.engines.replicated import Replicated
from tram_ds.models.chunked import Chunked
from tram_ds.models.output import Output
from tram_ds.runtime.ranks import Job
from tram_ds.tasks.causal import next_tokens

ENGINES = ("replicated", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
OURS = ("base", "sam", "asam", "tram_x", "tram_prev", "tram_fisher")
SIZES = {  # n_layer, n_embd, n_head, vocabulary
    "tiny": (2, 64, 2, 512),
    "small": (4, 256, 4, 2048),
    "18M": (8, 384, 6, 8192),
    "vocabulary": (2, 128, 2, 50257),
}
# torch's own optimizers: DeepSpeed refuses them without the first, with offload also without the
# second
ZERO = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
# configs/deepspeed for small models: buckets that do not drown them, only norms and biases
# persistent
ZERO_OPTIMIZATION = {
    "contiguous_gradients": True,
    "overlap_comm": False,
    "round_robin_gradients": False,
    "reduce_bucket_size": 1_000_000,
    "allgather_bucket_size": 1_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": 1000,
}


@dataclass(frozen=True)
class Work:
    """The same for everyone. rows x tokens: of one rank's micro-batch. dtype: of the working copy.

    logits: ours take them whole or in chunks; the peers' loops hold them whole.
    """

    size: str = "small"
    rows: int = 4
    tokens: int = 128
    dtype: str = "float32"
    logits: str = "chunks"
    seed: int = 0

    def model(self) -> nn.Module:
        """A GPT-2 without dropout, fp32, of this seed."""
        from transformers import GPT2Config, GPT2LMHeadModel

        layers, width, heads, vocabulary = SIZES[self.size]
        torch.manual_seed(self.seed)
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=self.tokens,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            use_cache=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        config._attn_implementation = "eager"  # every product is one FlopCounterMode counts
        return GPT2LMHeadModel(config).train()

    def batch(self, job: Job) -> dict[str, Tensor]:
        """This rank's tokens, (rows, tokens), on its device."""
        g = torch.Generator().manual_seed(self.seed + 1 + job.rank)
        return {
            "input_ids": torch.randint(
                0, SIZES[self.size][3], (self.rows, self.tokens), generator=g
            ).to(job.device)
        }


def forward(model: Any, batch: dict[str, Tensor]) -> Output:
    """Summed next-token loss and the logits of every position."""
    logits = model(input_ids=batch["input_ids"]).logits
    targets = F.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return Output(loss, (targets != -100).sum(), logits.flatten(0, 1), rows=len(targets))


def build_engine(name: str, work: Work, job: Job) -> Engine:
    """The engine `name` of ENGINES around a fresh model. Collective."""
    dtype = getattr(torch, work.dtype)
    model, optimizer = work.model(), lambda module: torch.optim.AdamW(module.parameters(), lr=1e-4)
    zero = name.startswith("zero")
    config = (
        {**ZERO, "zero_optimization": {**ZERO_OPTIMIZATION, "stage": int(name[-1])}} if zero else {}
    )
    known = {"ddp": "replicated", "replicated": "replicated", "fsdp2": "fsdp2"}.get(name, "zero")
    return engines.build(
        known, model, engines.Settings(job, optimizer, config, dtype, work.rows, 1)
    )


def ours(
    name: str, engine: Engine, batch: dict[str, Tensor], work: Work
) -> tuple[Stepper, Callable[[], object]]:
    """A stepper of row `name` on a shared engine, and a call that takes one step."""
    stepper = Stepper(engine, algorithm(name), work.seed)
    taken = forward if work.logits == "whole" else Chunked(lambda batch: batch, next_tokens)
    # upcoming: rows that look ahead to the next batch, here the same one, do so in every step
    return stepper, lambda: stepper.step([batch], taken, upcoming=[batch])


def peers(name: str, engine: Any, batch: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """The loops others write, on the same weights: {label: one step}. Labels of peers that are
    missing map to nothing."""
    if name.startswith("zero"):
        return {"deepspeed_adamw": lambda: _deepspeed(engine, batch)}
    found: dict[str, Callable[[], object]] = {"adamw": lambda: _plain(engine, batch)}
    if isinstance(engine.weights, Replicated) and (sam := _pytorch_optimizer()) is not None:
        for label, adaptive in (("pytorch_optimizer_sam", False), ("pytorch_optimizer_asam", True)):
            optimizer = sam(
                list(engine.module.parameters()),
                base_optimizer=torch.optim.AdamW,
                rho=0.05,
                adaptive=adaptive,
                lr=1e-4,
            )
            found[label] = lambda optimizer=optimizer: _sam(engine, optimizer, batch)
    return found


def _pytorch_optimizer() -> Any | None:
    try:
        from pytorch_optimizer import SAM  # type: ignore[import-not-found]
    except ImportError:
        return None
    return SAM


def missing_peers() -> list[str]:
    """A line per peer that is not installed, with the way to get it."""
    if _pytorch_optimizer() is None:
        return ["pytorch_optimizer SAM/ASAM: skipped, not installed (pip install 'tram_ds[bench]')"]
    return []


def _loss(engine: Any, batch: dict[str, Tensor]) -> Tensor:
    with engine.autocast():
        output = forward(engine.model, batch)
    return output.loss_sum / output.count


def _plain(engine: Any, batch: dict[str, Tensor]) -> None:
    _loss(engine, batch).backward()
    engine.weights.optimizer.step()
    engine.weights.optimizer.zero_grad(set_to_none=True)


def _deepspeed(engine: Any, batch: dict[str, Tensor]) -> None:
    engine.model.set_gradient_accumulation_boundary(True)
    engine.model.backward(_loss(engine, batch))
    engine.model.step()
    engine.clear()  # DeepSpeed clears in its step; what tram_ds looks at must be clear as well


def _sam(engine: Any, optimizer: Any, batch: dict[str, Tensor]) -> None:
    """davda54's two calls around two passes; under DDP both passes are reduced, which its authors
    leave to the user."""
    _loss(engine, batch).backward()
    optimizer.first_step(zero_grad=True)
    _loss(engine, batch).backward()
    optimizer.second_step(zero_grad=True)

"""`python -m tests.models.compile_worker OUT ENGINE`: the same short runs with compiled blocks and
without."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from tests.parity import build
from tram_ds.engines.shards import Shards
from tram_ds.models.pretrained import load_model
from tram_ds.recipe.model_section import ModelSection

INIT = {
    "architecture": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "vocab_size": 61,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def fast(parameters: Any) -> torch.optim.Optimizer:
    """Moves every tensor by more than the comparison allows."""
    return torch.optim.SGD(parameters, lr=0.5)


def forward(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    return loss, ids[:, 1:].numel(), logits.flatten(0, 1)


def ids(step: int, micro: int, rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(
        61, (rows, length), generator=torch.Generator().manual_seed(100 * step + micro)
    )


def train(
    engine: str, rank: int, steps: int = 3, **options: Any
) -> tuple[Shards, Shards, list[str], list[float]]:
    """(weights before, after, parameter names, distances); an evaluation at other shapes follows
    each step."""
    model = load_model(AutoModelForCausalLM, ModelSection(init=INIT, **options))
    names = list(model.state_dict())
    stepper = build.stepper(
        engine, model, "tram_prev", 2, optimizer=fast, radius_scale=20.0, reference_mode="paired"
    )
    before, distances = stepper.engine.params().clone(), []
    for step in range(steps):
        report = stepper.step([ids(step, 2 * rank + j) for j in range(2)], forward)
        distances.append(float(report.distance))
        with torch.no_grad():
            for rows, length in ((2, 16), (3, 9), (1, 16), (1, 7)):
                stepper.engine.model.eval()
                forward(stepper.engine.model, ids(9, 9, rows, length))
                stepper.engine.model.train()
    return before, stepper.engine.params().clone(), names, distances


def apart(a: Shards, b: Shards) -> list[float]:
    """|a - b| / |b| of each tensor's part on this rank."""
    pairs = zip(a, b, strict=True)
    return [float((x - y).norm() / y.norm()) for x, y in pairs if y.numel()]


def main(out: str, engine: str) -> None:
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    rank, _ = build.start(engine)
    rows = {}
    for checkpointing in (False, True):
        options = {"dropout": 0.0, "activation_checkpointing": checkpointing}
        start, plain, names, _ = train(engine, rank, **options)
        counters.clear()
        torch._dynamo.reset()
        _, compiled, same, _ = train(engine, rank, compile=True, **options)
        stats = {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }
        error, moved = build.gather(max(apart(compiled, plain))), min(apart(start, plain))
        rows[f"checkpointing={checkpointing}"] = {
            "error": error,
            "moved": moved,
            "names": names == same,
            **stats,
        }
    rows["dropout"] = train(engine, rank, compile=True, dropout=0.3, steps=2)[3]
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What every engine makes of a model that is loaded whole, and of one that is left in its files, or
not drawn yet: python -m tests.models.stored_worker OUT CASES ENGINES, on any number of ranks.

CASES: JSON, name -> {path or init, auto, half, frozen}. OUT: name -> engine -> {whole, stored},
each a digest per rank of masters, working copy, buffers, frozen parameters and ties, and the loss.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from tests.parity.build import leave
from tram_ds.engines import choose as engines
from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.sections import OptimizerSection
from tram_ds.runtime.ranks import detect, joined
from tram_ds.training.optimizer import make

ZERO = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"overlap_comm": False, "stage3_param_persistence_threshold": 100},
}


def digest(tensors: Any) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def settings(
    job: Any, name: str, half: bool, fill: Any, accumulation: int = 1, **more: Any
) -> engines.Settings:
    config: dict[str, Any] = {}
    if name.startswith("zero"):
        config = {**ZERO, "zero_optimization": {**ZERO["zero_optimization"], "stage": int(name[4])}}
    return engines.Settings(
        job,
        lambda module: make(OptimizerSection(name="adamw", lr=0.01, weight_decay=0.1), module),
        config,
        torch.bfloat16 if half else torch.float32,
        1,
        accumulation,
        fill=fill,
        **more,
    )


def build(job: Any, case: dict[str, Any], name: str, load: Any) -> dict[str, Any]:
    section = ModelSection(path=case.get("path"), init=case.get("init"))
    more: dict[str, Any] = {}
    if "Sequence" in case["auto"]:
        more |= {"num_labels": 3, "new_head": True}
    if section.path:
        more["cache_dir"] = str(Path(section.path).parent / "cache")  # of pickles alone
    model = load(getattr(transformers, case["auto"]), section, seed=5, **more)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(case["frozen"] not in key if case["frozen"] else True)
    stored: Any = getattr(model, "stored", None)
    if load is load_stored:
        meta = {key for key, p in model.named_parameters() if p.is_meta}
        read = {key for key, _ in model.named_parameters()} - meta
        assert meta and read == set(stored.new), "of these alone there are values already"
    kind = {"ddp": "replicated", "fsdp2": "fsdp2"}.get(name, "zero")
    engine = engines.build(
        kind, model, settings(job, name, case["half"], stored.read if stored else None)
    )
    groups = [len(g["params"]) for g in engine.weights.optimizer.param_groups]
    found = {
        "masters": digest(engine.params()),
        "working": digest(engine.working()),
        "buffers": digest(engine.module.buffers()),
        "frozen": digest(engine.weights.frozen()),
        "groups": groups,
        "tied": len(list(engine.module.parameters())),
        "loss": loss(engine),
    }
    if hasattr(engine.model, "destroy"):
        engine.model.destroy()
    return found


def loss(engine: Any) -> float:
    ids = torch.arange(16)[None] % 48 + 1
    engine.module.eval()
    with torch.no_grad(), engine.autocast():
        return float(engine.model(input_ids=ids).logits.double().square().mean())


def main(out: str, cases: str, names: str) -> None:
    job = detect()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined(job, "zero" if "zero" in names else "fsdp2"):
        for case, what in json.loads(Path(cases).read_text()).items():
            for name in names.split(","):
                each = {
                    way: build(job, what, name, load)
                    for way, load in (("whole", load_model), ("stored", load_stored))
                }
                every: list[Any] = [None] * job.world_size
                dist.all_gather_object(every, each)
                found.setdefault(case, {})[name] = every
        if job.rank == 0:
            Path(out).write_text(json.dumps(found))
        dist.barrier()
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:4])

"""Exports from every engine on any number of ranks, compared with the weights they were built of:
python -m tests.checkpoint.export_worker OUT FOLDER ENGINES.

OUT: engine -> case -> the tensors that differ in a bit, or are lacking or in excess. A case is a
model, the precision of the engine, the dtype of the files, and whether the ranks share the folder.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.stored_worker import settings
from tests.models.test_stored import TINY
from tests.parity.build import leave
from tram_ds.checkpoint.export import export, read_export
from tram_ds.engines import choose as engines
from tram_ds.runtime import shared_folder
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import detect, joined

BITS = {4: torch.int32, 2: torch.int16}
MODELS = (("gpt2", False), ("llama", True))  # tied, fp32; untied, a frozen block, bf16
DTYPES = (torch.float32, torch.bfloat16)


def model(kind: str, frozen: bool) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **TINY[kind], bos_token_id=1, eos_token_id=2)
    made: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        next(iter(made.parameters()))[:, ::3] = -0.0
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not (frozen and "layers.0." in name))
    return made


def build(job: Any, name: str, kind: str, half: bool) -> Any:
    options = settings(job, name, half, None)
    if name == "hybrid":
        options.config["shard_size"] = 1
    engine = {"ddp": "replicated", "fsdp2": "fsdp2", "hybrid": "fsdp2"}.get(name, "zero")
    return engines.build(engine, model(kind, half), options)


def differing(folder: Path, want: Any, dtype: torch.dtype, half: bool) -> list[str]:
    found: Any = AutoModelForCausalLM.from_pretrained(folder)  # by its config's dtype
    there, state = found.state_dict(), want.state_dict()
    frozen = {name for name, p in want.named_parameters() if not p.requires_grad}
    wrong = [f"{name}: {t.dtype}" for name, t in there.items() if t.dtype != dtype]
    for name in there.keys() & state.keys():
        expected = state[name]
        if name in frozen and half:  # the working copy is all that ZeRO has of it
            expected = expected.to(torch.bfloat16)
        one, two = there[name], expected.to(dtype)
        bits = BITS[one.element_size()]
        if not torch.equal(one.view(bits), two.view(bits)):
            wrong.append(name)
    return wrong + sorted(there.keys() ^ state.keys())


def cases(job: Any, name: str, root: Path, peers: Peers) -> dict[str, list[str]]:
    found = {}
    for kind, half in MODELS:
        engine, want = build(job, name, kind, half), model(kind, half)
        for dtype, shared in itertools.product(DTYPES, (True, False)):
            if not shared and dtype == torch.bfloat16:
                continue
            # a relative path is another folder on each rank
            case = f"{kind} {dtype} {'shared' if shared else 'apart'}"
            folder = root / name / case if shared else Path(f"{name} {case}")
            export(engine, folder, peers, dtype=dtype, max_shard_size="5KB")
            wrong = []
            if job.rank == 0:
                rounds = half and name.startswith("zero")
                wrong = differing(folder, want, dtype, rounds)
                wrong += [] if len(list(folder.glob("*-of-*"))) > 1 else ["one file"]
            if shared and dtype == torch.float32:
                dist.barrier()
                if not read_export(engine, folder).equal(engine.params()):
                    wrong.append(f"read back on rank {job.rank}")
            every: list[Any] = [None] * job.world_size
            dist.all_gather_object(every, wrong)
            found[case] = [text for each in every for text in each]
        if hasattr(engine.model, "destroy"):
            engine.model.destroy()
    return found


def main(out: str, folder: str, names: str) -> None:
    job = detect()
    torch.set_num_threads(1)
    shared_folder.PATIENCE = 0.2
    root = Path(folder)
    (root / f"rank{job.rank}").mkdir()
    os.chdir(root / f"rank{job.rank}")
    with joined(job, "zero" if "zero" in names else "fsdp2"):
        peers = Peers(job.world_size)
        found = {name: cases(job, name, root, peers) for name in names.split(",")}
        if job.rank == 0:
            Path(out).write_text(json.dumps(found))
        dist.barrier()
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:4])

"""A model of GPT2-XL's width once from its file to its scores: load, two TRAM steps, checkpoint,
resume, export, score, on 2 ranks, with the launch scripts as a cluster runs them, and the host
memory that each launch took.

python -m tests.bench.whole_way FOLDER ENGINE LAYERS; ENGINE: fsdp2 or zero3. 24 layers are 0.82 B
parameters; without a GPU all states lie on the host, which takes 20 GiB under FSDP2 and more than
23 under ZeRO-3.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from tests import ranks
from tests.bench.host_memory_worker import anonymous
from tram_ds.checkpoint.resume import latest
from tram_ds.data.bpe import train_tokenizer
from tram_ds.data.generated import GeneratedSource

WORLD = 2
ENGINES: dict[str, Any] = {"fsdp2": "fsdp2", "zero3": {"name": "zero", "config": "zero3.json"}}


def main(place: str, engine: str, layers: str) -> None:
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    model = model_folder(folder, int(layers))
    recipe = folder / f"{engine}.yaml"
    recipe.write_text(yaml.safe_dump(content(model, engine)))
    train = [str(ranks.ROOT / "launch" / "train.py"), "--recipe", str(recipe)]
    run = f"run_dir={folder / engine}"
    # it stops as a run does that a scheduler takes the machine from; torchrun makes 1 of exit 75
    launch("one step, a checkpoint", [*train, run, "train.stop_after=1"], folder, ends=1)
    assert latest(folder / engine), f"no checkpoint: see {folder / 'log.txt'}"
    launch("resume, one step, export", [*train, run, "--resume"], folder)
    score = [str(ranks.ROOT / "launch" / "evaluate.py"), "--recipe", str(recipe), "--sharded"]
    out = folder / f"{engine}.json"
    launch("score the export", [*score, "--model", str(folder / engine), "--out", str(out)], folder)
    results = json.loads((folder / engine / "results.json").read_text())
    print(json.dumps({"run": results["scores"], "export": json.loads(out.read_text())}))


def model_folder(folder: Path, layers: int) -> Path:
    """Random weights in a bf16 file, and a tokenizer."""
    path = folder / f"model-{layers}"
    if (path / "config.json").exists():
        return path
    config = GPT2Config(n_embd=1600, n_head=25, n_layer=layers, n_positions=1024)
    with torch.device("meta"):
        empty = GPT2LMHeadModel(config)
    torch.manual_seed(0)
    model = empty.to(torch.bfloat16).to_empty(device="cpu")
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "ln_" in name and "weight" in name else p.data.normal_(std=0.02)
    model.tie_weights()  # to_empty() has made two of the one
    model.save_pretrained(path)
    train_tokenizer(GeneratedSource().read("animals", "train"), 512).save_pretrained(path)
    return path


def content(model: Path, engine: str) -> dict[str, Any]:
    return {
        "task": {
            "name": "language_modeling",
            "data": "generated",
            "train": "animals",
            "eval": ["animals", "weather"],
            "seq_len": 32,
            "max_eval_tokens": 256,
            "cache_dir": str(model.parent / "cache"),
        },
        "model": {"path": str(model), "dtype": "bfloat16"},
        "algorithm": {"name": "tram_x", "radius": "relative", "rho": 0.05},
        "optimizer": {"name": "adamw", "lr": 1e-5},
        "engine": ENGINES[engine],
        "train": {"steps": 2, "global_batch": WORLD, "micro_batch": 1},
        "checkpoint": {"every_steps": 1, "keep": 1},
        "eval": {"every_steps": None},
        "export": {"dtype": "bfloat16"},
        "tracking": {"enabled": False},
    }


def launch(what: str, command: list[str], folder: Path, ends: int = 0) -> None:
    """One job of WORLD ranks; its seconds and the most that each rank held that no file backs."""
    start = time.time()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    with (folder / "log.txt").open("a") as log:
        job = subprocess.Popen(
            [sys.executable, *torchrun, *command],
            cwd=folder,
            env=ranks.environment(),
            stdout=log,
            stderr=log,
        )
        most: dict[int, int] = {}
        while job.poll() is None:
            for pid in children(job.pid):
                with suppress(OSError, StopIteration):  # it ended
                    most[pid] = max(most.get(pid, 0), anonymous(pid))
            time.sleep(0.02)
    held = sorted(most.values())[-WORLD:]
    shown = ", ".join(f"{b / 2**30:.2f}" for b in held)
    print(f"{what}: exit {job.returncode}, {time.time() - start:.0f} s, GiB: {shown}", flush=True)
    if job.returncode != ends:
        sys.exit(f"see {folder / 'log.txt'}")


def children(pid: int) -> list[int]:
    try:
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it ended
        return []


if __name__ == "__main__":
    main(*sys.argv[1:4])

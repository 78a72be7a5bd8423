"""Whole runs of a tiny recipe: one that is stopped and resumed, beside one that is not; and one of
which a rank is killed."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tram_ds.runtime.run_layout import LATEST, RunFolder
from tram_ds.verification import jobs

DETERMINISTIC = "tram_ds.verification.deterministic"
STEPS = 6
TIMEOUT = 60.0  # train.timeout of the run that loses a rank
# seconds after it by when the others are gone: NCCL's own end, which comes later and says nothing
LATE = 60.0
START = 180.0  # seconds for a job's imports, its data and its first steps


def recipe(folder: Path, engine: Mapping[str, Any], world: int) -> Path:
    """A tiny bf16 GPT-2 on generated text, with dropout, as a file; its runs lie beside it."""
    path = folder / "verify.yaml"
    path.write_text(
        f"""
name: verify
task: {{name: language_modeling, data: generated, seq_len: 32, max_eval_tokens: 400,
       cache_dir: {json.dumps(str(folder / "cache"))}}}
model: {{init: {{architecture: gpt2, n_layer: 2, n_embd: 64, n_head: 2}}, dtype: bfloat16}}
algorithm: {{name: tram_prev, radius_scale: 5.0}}
optimizer: {{name: adamw, lr: 1.0e-3}}
engine: {json.dumps(dict(engine))}
train: {{steps: {STEPS}, global_batch: {2 * world}, micro_batch: 1, timeout: {TIMEOUT}}}
checkpoint: {{every_steps: 2}}
tracking: {{enabled: false}}
""",
        encoding="utf-8",
    )
    return path


def resumed(
    launch: Callable[..., Any], engine: Mapping[str, Any], world: int, seconds: float
) -> dict[str, Any]:
    """sha256 of the export of a run of STEPS, and of one that is stopped in its middle and resumed,
    both with deterministic kernels."""
    with tempfile.TemporaryDirectory(prefix="tram_ds-verify-") as name:
        folder, end = Path(name), time.monotonic() + seconds
        path = recipe(folder, engine, world)

        def run(where: str, *words: str) -> int:
            words = (str(path), f"run_dir={json.dumps(str(folder / where))}", *words)
            left = end - time.monotonic()
            return launch(DETERMINISTIC, *words, world=world, timeout=left)["code"]

        codes = [
            run("whole"),
            run("cut", f"train.stop_after={STEPS // 2}"),
            run("cut", "--resume"),
        ]
        digests = [_digest(RunFolder(folder / where).export) for where in ("whole", "cut")]
        return {"codes": codes, "digests": digests, "steps": STEPS}


def _digest(export: Path) -> str:
    """Of all weights in an export."""
    found = hashlib.sha256()
    for path in sorted(export.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def killed(world: int, seconds: float) -> dict[str, Any]:
    """Exit codes and words of the ranks of a run whose last one is killed once it has a checkpoint,
    and the seconds until the others were gone. JobFailed where it never gets there."""
    with tempfile.TemporaryDirectory(prefix="tram_ds-verify-") as name:
        folder = Path(name)
        path = recipe(folder, {"name": "fsdp2", "config": "shard.yaml"}, world)
        run_dir = folder / "run"
        words = ["train", "--recipe", str(path), f"run_dir={json.dumps(str(run_dir))}"]
        ranks = jobs.start("tram_ds", [*words, "train.steps=1000000"], world, folder)
        try:
            _wait_for(RunFolder(run_dir).checkpoints / LATEST, ranks, min(START, seconds))
            # the last rank: rank 0 serves the store, and its loss would be another one
            ranks.processes[-1].kill()
            began = time.monotonic()
            limit = TIMEOUT + LATE
            codes = ranks.wait(limit, grace=limit)
            took = time.monotonic() - began
        finally:
            ranks.kill()
        said = [ranks.said(rank).splitlines() for rank in range(world - 1)]
        return {"codes": codes[:-1], "seconds": took, "timeout": TIMEOUT, "said": said}


def _wait_for(file: Path, ranks: jobs.Ranks, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        ended = any(process.poll() is not None for process in ranks.processes)
        if ended or time.monotonic() > end:
            last = " | ".join(ranks.said(0).strip().splitlines()[-3:])
            why = "a rank ended" if ended else f"{seconds:.0f} s were over"
            raise jobs.JobFailed(f"{why} before the first checkpoint: {last}")
        time.sleep(0.1)

"""The same runs on a GPU: skipped without one. `make test PYTEST_FLAGS="-m gpu"` on a machine that
has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.test_train import RECIPE, TRAIN
from tests.ranks import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def records(folder: Path, *overrides: str, accelerator: str) -> list[dict[str, float]]:
    folder.mkdir()
    (folder / "tiny.yaml").write_text(RECIPE)
    env = {k: v for k, v in environment().items() if k != "DS_ACCELERATOR"} | (
        {"DS_ACCELERATOR": "cpu"} if accelerator == "cpu" else {}
    )
    command = [
        sys.executable,
        TRAIN,
        "--recipe",
        "tiny.yaml",
        "model.dropout=0.0",
        "algorithm={name: tram_prev}",
        *overrides,
    ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        json.loads(line)
        for line in (folder / "runs" / "tiny-tram_prev-0" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]


@pytest.mark.parametrize(
    "engine",
    ("replicated", "fsdp2", "{name: zero, config: zero2.json}", "{name: zero, config: zero3.json}"),
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_gpu_trains_as_the_cpu_does(engine: str, dtype: str, tmp_path: Path) -> None:
    """fp32 to 1e-4, a bf16 working copy to 2 %; the self-check passes (a bitwise restore,
    |epsilon/T| equal to the radius)."""
    want = records(tmp_path / "cpu", "engine=replicated", accelerator="cpu")
    got = records(tmp_path / "gpu", f"engine={engine}", f"model.dtype={dtype}", accelerator="cuda")
    for a, b in zip(want, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4 if dtype == "float32" else 2e-2)
        assert b["skipped"] == 0

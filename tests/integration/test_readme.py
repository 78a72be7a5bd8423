"""The examples of docs/loop.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, environment, script

pytestmark = pytest.mark.integration

BLOCKS = re.findall(
    r"```python\n# run: (\w+)\n(.*?)```", (ROOT / "docs" / "loop.md").read_text(), flags=re.DOTALL
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_there_is_one_example_per_engine() -> None:
    text = "".join(code for _, code in BLOCKS)
    assert [launcher for launcher, _ in BLOCKS] == ["python", "torchrun", "torchrun", "deepspeed"]
    assert all(
        name in text for name in ("DistributedDataParallel", "fully_shard", "deepspeed.initialize")
    )


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_an_example_runs_and_is_short(index: int, tmp_path: Path) -> None:
    launcher, code = BLOCKS[index]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    (tmp_path / "example.py").write_text(code)
    # As a user runs it, but for the end: threads of DeepSpeed's can abort the interpreter's own way
    # out.
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import os, runpy, sys\nrunpy.run_path('example.py')\nsys.stdout.flush()\nos._exit(0)\n"
    )
    if index == 1:  # the launcher itself once: the others read the variables that it sets
        done = subprocess.run(
            [sys.executable, *TORCHRUN, str(runner)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
        )
    else:
        done = script(runner, cwd=tmp_path, world=1 if launcher == "python" else 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"\d\.\d+", done.stdout)

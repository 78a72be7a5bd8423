"""tram_ds.runtime.ranks: how the process group is joined and left."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tram_ds.runtime import ranks
from tram_ds.runtime.ranks import Job
from tram_ds.training.opening import WATCHDOG_GRACE

ROOT = Path(__file__).resolve().parents[2]


def test_the_group_outlives_a_model_that_ddp_has_wrapped() -> None:
    """DDP's reducer dies holding the GIL; were it the group's last owner, it could wait for ever
    for gloo's threads.

    Twice, because torch itself keeps the first group of a process.
    """
    script = (
        "import gc, weakref, torch, torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "from tram_ds.runtime.ranks import Job, joined\n"
        "for _ in range(2):\n"
        "    with joined(Job(0, 0, 1, 'python', torch.device('cpu')), 'sharded'):\n"
        "        model = DistributedDataParallel(torch.nn.Linear(2, 2))\n"
        "        for _ in range(2):\n"
        "            model(torch.ones(1, 2)).sum().backward()\n"
        "        group = weakref.ref(dist.group.WORLD)\n"
        "    del model\n"
        "    gc.collect()\n"
        "    assert not dist.is_initialized() and group() is not None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device, longer", [("cpu", False), ("cuda", True)])
def test_nccl_gives_up_after_the_watchdog_has_named_rank_and_step(
    monkeypatch: pytest.MonkeyPatch, device: str, longer: bool
) -> None:
    asked: list[timedelta] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(ranks, "meet", lambda *_: None)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *_, timeout, **__: asked.append(timeout)
    )
    with ranks.joined(
        Job(0, 0, 2, "torchrun", torch.device(device)), "fsdp2", timedelta(minutes=1)
    ):
        pass
    watchdog = timedelta(minutes=1, seconds=WATCHDOG_GRACE)
    assert (asked[0] > watchdog) == longer

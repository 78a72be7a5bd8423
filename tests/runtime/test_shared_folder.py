"""Two ranks with a working folder each: a folder one of them does not see is refused on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.ranks import environment, free_port

SCRIPT = """
import torch
from pathlib import Path
from tram_ds.runtime.ranks import Job, detect, from_rank_0, joined
from tram_ds.runtime.shared_folder import refuse_unshared
job = detect()
with joined(job, "replicated"):
    assert from_rank_0(lambda: job.rank) == 0, "what rank 0 finds is what all find"
    try:
        from_rank_0(lambda: Path("mine").read_text())
    except FileNotFoundError as error:
        print("both:", error)
    for name in (SHARED, "mine"):
        if job.rank == 0:
            Path(name).mkdir(exist_ok=True)
        try:
            refuse_unshared(Path(name), job.world_size, patience=0.5)
            print("shared", list(Path(name).iterdir()) if job.rank == 0 else [])
        except ValueError as error:
            print(error)
"""


def test_a_folder_that_one_node_does_not_see_is_refused_on_all(tmp_path: Path) -> None:
    port = str(free_port())
    ranks = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        place = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        env = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        script = SCRIPT.replace("SHARED", repr(str(tmp_path / "shared")))
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                cwd=tmp_path / rank,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    node = os.uname().nodename
    for text in said:
        assert "both: [Errno 2]" in text and "shared []" in text, text
        assert (
            f"run_dir = mine is not shared: rank 1 on {node} does not see what rank 0 on {node} "
            "wrote there: set run_dir to a folder that all nodes share" in text
        ), text
    assert not list((tmp_path / "0" / "mine").iterdir()), "the probe is gone"

"""Full and read-only disks, and ranks killed in the middle of a save: the commit before it is
always whole."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import forked
from tests.faults.jobs import digest, stepper, train
from tram_ds.checkpoint import resume as checkpoint
from tram_ds.checkpoint.resume import Saver
from tram_ds.runtime.exits import CheckpointError

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def mounted(where: Path, *options: str) -> contextlib.AbstractContextManager[None]:
    """A tmpfs, unmounted at the end; skips with the reason where that is not allowed."""

    @contextlib.contextmanager
    def mount() -> Iterator[None]:
        where.mkdir(exist_ok=True)
        if os.geteuid() != 0:
            pytest.skip("mounting a tmpfs needs root")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *options, "tmpfs", where], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", where], check=True)

    return mount()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_old_commit(tmp_path: Path, asynchronous: bool) -> None:
    built = stepper("single", "tram_prev", 1, micros=1)
    train(built, 1, 1)
    with (
        mounted(tmp_path / "small", "-o", "size=300k"),
        Saver(tmp_path / "small", built, keep=9) as saver,
    ):
        saver.save()
        kept, before = checkpoint.latest(tmp_path / "small"), digest(built)
        with pytest.raises(CheckpointError, match=r"saving step .* needs .* MB, and .* MB free"):
            for _ in range(6):
                train(built, 1, 1)
                saver.save(asynchronous)
                saver.wait()
                kept, before = checkpoint.latest(tmp_path / "small"), digest(built)
        names = [p.name for p in (tmp_path / "small/checkpoints").iterdir()]
        assert kept is not None and not [name for name in names if ".tmp-" in name]
        checkpoint.load(built, kept)
        assert digest(built) == before


def test_a_folder_that_cannot_be_written_is_found_before_step_0(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"preparing .*file"):
        Saver(tmp_path / "file", stepper("single", "sam", 1))
    with (
        mounted(tmp_path / "ro", "-o", "ro"),
        pytest.raises(CheckpointError, match="Read-only file system"),
    ):
        Saver(tmp_path / "ro", stepper("single", "sam", 1))


@functools.cache
def deaths() -> list[Any]:
    return forked(
        [
            ("kill_at_every_point", 1, [False]),
            ("kill_at_every_point", 1, [True]),
            ("limited_file_size", 2, []),
            ("peer_killed", 2, []),
            ("lock_is_agreed", 2, []),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_kill_9_at_every_point_of_a_save_leaves_a_whole_commit(again: bool) -> None:
    found = deaths()[int(again)]
    assert found["wrong"] == [] and len(found["points"]) > 35
    assert found["old"] + found["new"] == len(found["points"])
    assert found["new"] >= 1 and (again or found["old"] > 20)


@pytest.mark.slow
def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks() -> None:
    found = deaths()[2]
    assert found["left"] == ["latest", "step-00000001"] and found["intact"]
    assert found["messages"][0] == found["messages"][1] and len(found["messages"][0]) == 2
    assert all(
        "failed on rank 1: OSError: [Errno 27] File too large;" in message
        for message in found["messages"][0]
    )
    assert found["after"] == ["step-00000002", "step-00000001"]


@pytest.mark.slow
def test_a_peer_killed_inside_a_save_is_noticed_and_the_old_commit_stays() -> None:
    found = deaths()[3]
    assert "another rank died" in found["message"] and found["seconds"] < 25
    assert found["step"] == 1 and found["left"] == ["latest", "step-00000001"]


@pytest.mark.slow
def test_all_ranks_learn_of_the_lock_and_of_its_loss() -> None:
    found = deaths()[4]
    assert found["messages"][0] == found["messages"][1] and found["commits"] == ["step-00000000"]
    refused, lost, free = found["messages"][0]
    assert (
        "is in use by process" in refused
        and "taken over by process None on node7" in lost
        and free == "in"
    )

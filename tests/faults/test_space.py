"""Room on the disk: known before the first step, waited for before a save, and nothing lost."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tests.faults.jobs import digest, stepper, train
from tests.faults.test_storage import mounted
from tests.integration.test_train import train as launched
from tram_ds import wrap
from tram_ds.checkpoint import resume, space
from tram_ds.checkpoint.resume import Saver
from tram_ds.checkpoint.space import Space
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
FULL = "[Errno 28] No space left on device"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What space.free answers, one number after the other, the last for ever."""
    answers: list[int] = []
    monkeypatch.setattr(space, "free", lambda _: answers.pop(0) if answers[1:] else answers[0])
    monkeypatch.setattr(space, "POLL", 0.01)
    return answers


def test_an_action_waits_for_room_and_says_what_it_needs(disk: list[int], tmp_path, capsys) -> None:
    disk += [10, 20, 99, 100]
    beats: list[str] = []
    place = Space(tmp_path, Peers(1), patience=60.0, beat=beats.append)
    assert place.until_done(100, "saving", lambda: "saved") == "saved"
    assert len(beats) == 3, "three looks too early"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, "one line a minute"
    assert f"saving needs 0.00 MB, and {tmp_path} has 0.00 MB free" in lines[0]


def test_a_disk_that_fills_in_the_middle_is_tried_again(disk: list[int], tmp_path) -> None:
    disk.append(1000)
    results = [CheckpointError(f"rank 1: OSError: {FULL}"), CheckpointError("Disk quota exceeded")]

    def action() -> str:
        if results:
            raise results.pop(0)
        return "saved"

    place = Space(tmp_path, Peers(1), patience=60.0)
    assert place.until_done(1, "saving", action) == "saved" and not results


def test_what_waiting_cannot_mend_is_raised_at_once(disk: list[int], tmp_path) -> None:
    disk.append(1000)

    def broken() -> None:
        raise CheckpointError("the lock was taken over")

    with pytest.raises(CheckpointError, match="taken over"):
        Space(tmp_path, Peers(1), patience=60.0).until_done(1, "saving", broken)


@pytest.mark.parametrize("patience", [0.0, 0.05])
def test_after_its_patience_a_run_gives_up_naming_what_it_needs(
    disk: list[int], tmp_path, patience: float
) -> None:
    disk.append(4_000_000)
    with pytest.raises(CheckpointError, match=r"saving needs 7\.00 MB, and .* has 4\.00 MB free"):
        Space(tmp_path, Peers(1), patience).until_done(7_000_000, "saving", lambda: None)


def test_free_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    want = os.statvfs(tmp_path)
    got = space.free(tmp_path / "not" / "yet")
    assert got == pytest.approx(want.f_bavail * want.f_frsize, rel=0.05)


@pytest.mark.parametrize(
    ("exports", "keep", "there", "copies"),
    [
        (["float32"], 2, 0, 3 * 4 + 1),
        (["float32"] * 2, 2, 0, 3 * 4 + 2),
        (["bfloat16"] * 2, 2, 0, 3 * 4 + 1),  # half as large each
        (["float32"], 1, 0, 2 * 4 + 1),
        (["float32"], 2, 1, 2 * 4 + 1),
    ],
)
def test_the_room_of_a_run_is_its_checkpoints_its_exports_and_its_logs(
    disk: list[int], tmp_path: Path, exports: list[str], keep: int, there: int, copies: int
) -> None:
    """AdamW and theta_{t-1}: four copies of the weights a checkpoint; keep and one being written,
    of which some are there; an export is one copy."""
    import torch

    model = torch.nn.Linear(100, 10)  # 1010 parameters
    built = wrap(model, torch.optim.AdamW(model.parameters()), "tram_prev")
    for step in range(there):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    needed = 1010 * 4 * copies + space.LOGS
    disk[:] = [needed - 1]
    with Saver(tmp_path, built, keep=keep) as saver:
        with pytest.raises(CheckpointError, match=r"checkpoint\.keep.*another run_dir"):
            saver.room(len(exports), getattr(torch, exports[0]))
        disk[:] = [needed]
        saver.room(len(exports), getattr(torch, exports[0]))


def test_a_save_on_a_full_disk_waits_until_somebody_makes_room(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(space, "POLL", 0.05)
    built = stepper("single", "tram_prev", 1, micros=1)
    train(built, 1, 1)
    place = tmp_path / "small"
    with mounted(place, "-o", "size=400k"), Saver(place, built, keep=1, patience=60.0) as saver:
        saver.save()
        first, before = resume.latest(place), digest(built)
        somebody = place / "somebody's"
        somebody.write_bytes(b"\0" * space.free(place))
        train(built, 1, 1)

        def later() -> None:
            time.sleep(0.3)
            kept.append(resume.latest(place))
            somebody.unlink()

        kept: list[Path | None] = []
        thread = threading.Thread(target=later)
        thread.start()
        saver.save()
        thread.join()
        assert kept == [first], "the old commit stands while the new one waits"
        assert resume.latest(place) != first and len(resume.candidates(place)) == 1
        assert digest(built) != before
        resume.load(built, resume.latest(place) or place)


def test_a_run_saves_by_the_clock_too(tmp_path: Path) -> None:
    """Every step is late at this pace; tram_prev looks ahead, so every second step can be saved."""
    done = launched(
        tmp_path,
        "algorithm={name: tram_prev, radius_scale: 50.0}",
        "checkpoint.every_minutes=1e-9",
        "checkpoint.keep=9",
        "tracking.enabled=false",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = sorted(p.name for p in (tmp_path / "runs").glob("*/checkpoints/step-*"))
    assert saved == ["step-00000002", "step-00000004"]


def test_a_run_without_room_ends_before_its_first_step(tmp_path: Path) -> None:
    small = tmp_path / "small"
    with mounted(small, "-o", "size=8m"):
        done = launched(tmp_path, f"run_dir={small}/run", "tracking.enabled=false")
        assert done.returncode == 4, done.stderr[-2000:]
        assert "needs 1" in done.stderr and "choose another run_dir" in done.stderr
        assert not (small / "run" / "metrics.jsonl").exists()

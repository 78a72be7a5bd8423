"""What is found out about a large file is found out once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tram_ds.data.digests import file_digest, remembered


def test_of_several_that_ask_at_once_one_computes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    begin, began, found = threading.Barrier(3), [], []

    def compute() -> list[int]:
        began.append(1)
        while len(waiting()) < 3 and began == [1]:  # until the others have asked
            os.sched_yield()
        return [7]

    def waiting() -> list[Path]:
        """Descriptors of the question's lock file: one a process or thread that asks."""
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.realpath(link).endswith(".lock")]

    def ask() -> None:
        begin.wait(30)
        found.append(remembered(tmp_path / "file", "question", compute, tmp_path / "cache"))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[7]] * 3 and began == [1]


def test_an_answer_that_failed_is_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")

    def refuse() -> None:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        remembered(tmp_path / "file", "question", refuse, tmp_path / "cache")
    assert remembered(tmp_path / "file", "question", lambda: 3, tmp_path / "cache") == 3


def test_a_file_that_changed_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    before = file_digest(tmp_path / "file", tmp_path / "cache")
    (tmp_path / "file").write_text("two")
    os.utime(tmp_path / "file", ns=(1, 1))
    assert file_digest(tmp_path / "file", tmp_path / "cache") != before

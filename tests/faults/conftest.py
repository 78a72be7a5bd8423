"""Run folders with commits, for the checkpoint tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.jobs import RECIPE, digest, stepper, train
from tram_ds.checkpoint.resume import Saver


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, str]]]:
    """A run folder with commits of steps 1 and 2, and their digests."""
    run_dir, built, digests = (
        tmp_path_factory.mktemp("run"),
        stepper("single", "tram_prev", 1, micros=1),
        {},
    )
    with Saver(run_dir, built, recipe=RECIPE, data="rows-a") as saver:
        for step in (1, 2):
            train(built, 1, 1)
            saver.save()
            digests[step] = digest(built)
    return run_dir, digests


@pytest.fixture
def run_dir(template: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(template[0], tmp_path / "run"))

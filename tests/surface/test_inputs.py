"""Two ranks whose nodes hold other files: an analysis is refused on both before a model is
built."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run
from tram_ds.recipe.loading import load
from tram_ds.surface.inputs import exported, scored_rows, training_rows

RECIPE = """
task: {name: language_modeling, data: data, seq_len: 16, cache_dir: cache}
model: {init: {architecture: gpt2, n_layer: 1, n_embd: 16, n_head: 2, vocab_size: 300}}
algorithm: base
optimizer: {lr: 1e-3}
train: {steps: 1, global_batch: 2, micro_batch: 1}
"""
NODE = os.uname().nodename


def write_node(folder: Path, rank: int) -> None:
    """What one rank finds in its working folder. The splits `train` and `test` are of the same
    length on both, with one word another; the export of rank 1 is longer."""
    (folder / "data" / "d").mkdir(parents=True)
    (folder / "run" / "export").mkdir(parents=True)
    (folder / "r.yaml").write_text(RECIPE)
    for split in ("train", "valid", "test"):
        word = f"word{rank if split != 'valid' else 0}"
        (folder / "data" / "d" / f"{split}.txt").write_text(f"same text, {word}\n" * 40)
    (folder / "run" / "export" / "model.safetensors").write_bytes(b"x" * (1 + rank))


def main(out: str, folder: str) -> None:
    """One rank; rank 0 writes what each rank was told of each reading."""
    import torch.distributed as dist

    from tram_ds.runtime.ranks import detect, joined

    job = detect()
    own = Path(folder) / str(job.rank)
    write_node(own, job.rank)
    os.chdir(own)
    recipe = load("r.yaml", [])
    readings: list[Callable[[], Any]] = [
        lambda: exported(recipe, Path("run"), job.world_size),
        lambda: scored_rows(recipe, None, "test", job.world_size),
        lambda: training_rows(recipe, job.world_size),
    ]
    told = []
    with joined(job, "replicated"):
        for reading in readings:
            try:
                reading()
                told.append("read")
            except ValueError as error:
                told.append(str(error))
        all_: list[Any] = [None] * job.world_size
        dist.all_gather_object(all_, told)
        if job.rank == 0:
            Path(out).write_text(json.dumps(all_))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    return run("tests.surface.test_inputs", str(tmp_path_factory.mktemp("nodes")))


def test_both_ranks_are_told_the_same(told: list[list[str]]) -> None:
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("number", "begins"),
    [
        (0, "the export is not the same on all ranks: names and sizes of files "),
        (1, "task.data data is not the same on all ranks: "),
        (2, "task.data data is not the same on all ranks: "),
    ],
)
def test_what_differs_is_named(told: list[list[str]], number: int, begins: str) -> None:
    line = told[0][number]
    assert line.startswith(begins) and f"for rank 1 on {NODE}" in line


if __name__ == "__main__":
    main(*sys.argv[1:])

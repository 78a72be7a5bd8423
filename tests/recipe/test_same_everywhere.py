"""Two ranks whose nodes have recipes or code of their own: both are told what differs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.ranks import run
from tram_ds.recipe import same_everywhere
from tram_ds.recipe.loading import load

NODE = os.uname().nodename
# what rank 1 says on its command line -> what both are told; None: nothing
CASES = {
    "task.cache_dir=/scratch/of-this-node": None,
    "optimizer.lr=0.5": "optimizer.lr 0.5 for rank 1",
    "algorithm.rho=0.5": "algorithm.rho 0.5 for rank 1",
    "model.init.n_layer=3": "model.init.n_layer 3 for rank 1",
    "eval.select=final": None,  # its default
}


def told(words: list[str], world_size: int) -> str | None:
    fresh = ["model.path=null", "model.init={architecture: gpt2}", "algorithm=sam"]
    try:
        same_everywhere.refuse_other_recipes(load("quickstart", [*fresh, *words]), world_size)
    except ValueError as error:
        return str(error)
    return None


def main(out: str) -> None:
    """One rank; rank 0 writes what each rank was told, case by case."""
    import torch.distributed as dist

    from tram_ds.runtime.ranks import detect, joined

    job = detect()
    with joined(job, "replicated"):
        mine = [told([word] if job.rank else [], job.world_size) for word in CASES]
        if job.rank:
            same_everywhere._code = lambda: {"torch": "another"}  # type: ignore[assignment]
        mine.append(told([], job.world_size))
        all_: list[Any] = [None] * job.world_size
        dist.all_gather_object(all_, mine)
        if job.rank == 0:
            Path(out).write_text(json.dumps(all_))


def test_all_ranks_are_told_of_another_recipe_or_other_code() -> None:
    first, second = run("tests.recipe.test_same_everywhere")
    assert first == second
    *found, code = first
    for (word, expected), said in zip(CASES.items(), found, strict=True):
        if expected is None:
            assert said is None, word
        else:
            assert f"not all ranks run the same: {expected} on {NODE}, " in said
            assert said.endswith("give all nodes the same recipe, command line and environment")
    assert "the code of tram_ds (sha256) 'unset' for rank 1" in code


def test_the_code_is_known_by_its_content() -> None:
    digest = same_everywhere._code()["the code of tram_ds (sha256)"]
    assert len(digest) == 12 and same_everywhere._code().keys() > {"torch", "transformers"}


if __name__ == "__main__":
    main(*sys.argv[1:])

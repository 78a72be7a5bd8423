"""Checks, in a minute and before queueing, what would end a run: data, folders, disk, tracking,
ranks, memory, one step. On the login node, then on the nodes, started as training is:

    tram doctor --recipe m2d2_gpt2xl.yaml --slurm a100_one_node.yaml slurm.account=abc
    srun --ntasks 4 tram doctor --recipe m2d2_gpt2xl.yaml

Exit codes: 0 all ok, 2 a problem.
"""

from __future__ import annotations

import argparse
import os

from tram_ds.cli import shared


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    shared.recipe(parser)
    parser.add_argument(
        "--slurm", help="a file, or a name in configs/slurm/: check the job SLURM would get, too"
    )
    parser.add_argument("--no-smoke", action="store_true", help="leave out the one-step run")
    shared.local_rank(parser)
    shared.overrides(parser, "recipe keys to change, or after `slurm.` keys of the SLURM config")


def run(options: argparse.Namespace) -> int:
    """Prints a line per check."""
    from tram_ds.jobs import slurm_config
    from tram_ds.recipe.loading import load

    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    ours, theirs = shared.slurm_keys(options.overrides)
    try:
        recipe = load(options.recipe, theirs)
        config = slurm_config.load(options.slurm, ours) if options.slurm else None
        from tram_ds.jobs import doctor  # torch is imported only for a recipe that can be read
        from tram_ds.runtime import ranks

        job = ranks.detect(options.local_rank)
        context = doctor.Context(recipe, job, config, ["--recipe", options.recipe, *theirs])
    except ValueError as error:
        if rank == "0":
            print("\n".join(f"problem  recipe         {line}" for line in str(error).splitlines()))
        return 2
    if rank == "0":
        print(f"ok       recipe         {options.recipe}: {recipe.name}", flush=True)
    return 0 if doctor.examine(context, ("smoke",) if options.no_smoke else ()) else 2

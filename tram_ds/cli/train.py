"""Trains one recipe, under deepspeed, torchrun, srun or plain python.

    deepspeed --num_accelerators 2 --module tram_ds train --recipe quickstart.yaml \\
        algorithm=asam train.seed=3
    torchrun --nproc_per_node 8 -m tram_ds train --recipe m2d2_gpt2xl.yaml engine=fsdp2
    tram train --recipe quickstart.yaml --dry-run

Exit codes: 0 done, 2 recipe or data, 3 numeric, 4 checkpoint, 5 run folder in use, 6 peer lost or
timeout, 75 stopped to be requeued.
"""

from __future__ import annotations

import argparse

from tram_ds.cli import shared
from tram_ds.runtime import terminal


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    shared.recipe(parser)
    parser.add_argument(
        "--smoke", action="store_true", help="the same code path with a tiny model, 3 steps"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, if there is one"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start afresh in a folder that holds a run"
    )
    parser.add_argument(
        "--allow-change", action="store_true", help="resume although the recipe has changed"
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="resume from an older checkpoint if the newest is damaged",
    )
    shared.local_rank(parser)
    shared.overrides(parser)


def run(options: argparse.Namespace) -> int:
    """The exit code."""
    from tram_ds.recipe.loading import load
    from tram_ds.recipe.recipe import dump

    recipe = load(options.recipe, options.overrides, smoke=options.smoke)
    if options.dry_run:
        print(dump(recipe), end="")
        return terminal.reported()
    # torch is imported only when something is to be trained
    from tram_ds.training.run import Request, run

    keys = ("resume", "overwrite", "allow_change", "fallback", "local_rank")
    return run(recipe, Request(**{key: getattr(options, key) for key in keys}))

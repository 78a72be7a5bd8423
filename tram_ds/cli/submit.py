"""Submits a recipe, its seeds or a sweep to SLURM: a job that saves, requeues itself and goes on
when it is interrupted.

    tram submit --recipe m2d2_gpt2xl.yaml --slurm a100_one_node.yaml \\
        slurm.account=abc
    tram submit --recipe cifar100_vit.yaml --slurm h100_one_node.yaml --seeds 1-20 \\
        slurm.gpus_per_node=1 --dry-run

Overrides are recipe keys (section.key=value) or, after `slurm.`, keys of the SLURM config. Exit
codes: 0, 2 refused.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from tram_ds.cli import shared
from tram_ds.runtime import terminal


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
    more = "; with --sweep it takes the place of those it names"
    shared.recipe(parser, more, required=False)
    parser.add_argument("--slurm", required=True, help="a file, or a name in configs/slurm/")
    parser.add_argument(
        "--seeds", help="one run per seed, e.g. 1-20 or 0,2,5-7; takes the place of a sweep's seeds"
    )
    parser.add_argument("--sweep", help="a file, or a name in recipes/sweeps/: one run per cell")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be submitted; write nothing"
    )
    shared.overrides(parser, "recipe keys to change, or after `slurm.` keys of the SLURM config")


def run(options: argparse.Namespace) -> int:
    """Prints the ids and how to watch; with --dry-run the job script and the commands."""
    from tram_ds.jobs import cells, slurm, slurm_config

    ours, theirs = shared.slurm_keys(options.overrides)
    try:
        config = slurm_config.load(options.slurm, ours)
        found = cells.cells(options.recipe, theirs, options.seeds, options.sweep)
        name = Path(options.sweep).stem if options.sweep else None
        plan = slurm.plan(found, config, array=bool(options.seeds or options.sweep), name=name)
        if plan.finished:
            print(f"{len(plan.finished)} run(s) are finished already and left out")
        if not plan.cells:
            return 0
        if options.dry_run:
            for script in plan.scripts:
                print(f"# {plan.folder / script}\n{plan.files[script]}")
            print("\n".join(f"# {shlex.join(command)}" for command in plan.commands()))
            return terminal.reported()
        print(slurm.submit(plan).text())
    except (ValueError, slurm.SlurmError, OSError) as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2
    return 0

"""Submits a recipe, its seeds or a sweep to SLURM: a job that saves, requeues itself and goes on
when it is interrupted.

    python launch/submit.py --recipe m2d2_gpt2xl.yaml --slurm a100_one_node.yaml slurm.account=abc
    python launch/submit.py --recipe cifar100_vit.yaml --slurm h100_one_node.yaml --seeds 1-20 \\
        --dry-run

Overrides are recipe keys (section.key=value) or, after `slurm.`, keys of the SLURM config. Exit
codes: 0, 2 refused.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.jobs import cells as slurm_cells
from tram_ds.jobs import slurm, slurm_config
from tram_ds.recipe.file import RecipeError
from tram_ds.runtime import terminal


def main(arguments: list[str] | None = None) -> int:
    """Prints the ids and how to watch; with --dry-run the job script and the commands."""
    terminal.guard()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        help="a file, or a name in recipes/; with --sweep it takes the place of those it names",
    )
    parser.add_argument("--slurm", required=True, help="a file, or a name in configs/slurm/")
    parser.add_argument(
        "--seeds", help="one run per seed, e.g. 1-20 or 0,2,5-7; takes the place of a sweep's seeds"
    )
    parser.add_argument("--sweep", help="a file, or a name in recipes/sweeps/: one run per cell")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be submitted; write nothing"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    ours = [text.removeprefix("slurm.") for text in options.overrides if text.startswith("slurm.")]
    theirs = [text for text in options.overrides if not text.startswith("slurm.")]
    try:
        config = slurm_config.load(options.slurm, ours)
        cells = slurm_cells.cells(options.recipe, theirs, options.seeds, options.sweep)
        name = Path(options.sweep).stem if options.sweep else None
        plan = slurm.plan(cells, config, array=bool(options.seeds or options.sweep), name=name)
        if plan.finished:
            print(f"{len(plan.finished)} run(s) are finished already and left out")
        if not plan.cells:
            return 0
        if options.dry_run:
            for name in plan.scripts:
                print(f"# {plan.folder / name}\n{plan.files[name]}")
            print("\n".join(f"# {shlex.join(command)}" for command in plan.commands()))
            return terminal.reported()
        print(slurm.submit(plan).text())
    except (RecipeError, slurm.SlurmError, OSError) as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

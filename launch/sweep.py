"""Runs every cell of a sweep, one after the other, and skips those that are finished.

    python launch/sweep.py --sweep table14_xnli_distances.yaml --launcher "deepspeed --num_gpus 8"
    python launch/sweep.py --sweep table3_images.yaml --dry-run

Overrides hold for every cell. Exit codes: 0 done, 2 refused, 75 stopped to be requeued, else the
first failed cell's.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tram_ds.jobs import sweep
from tram_ds.recipe.file import RecipeError
from tram_ds.runtime import terminal


def main(arguments: list[str] | None = None) -> int:
    """Prints a line per cell; returns the exit code."""
    terminal.guard()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", required=True, help="a file, or a name in recipes/sweeps/")
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        help='what runs launch/train.py, e.g. "deepspeed --num_gpus 8"',
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the cells and their commands; run nothing"
    )
    parser.add_argument(
        "--continue-on-error",
        action="store_true",
        help="go on with the next cell after a failed one",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="every cell with a tiny model, 3 steps"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="recipe keys to change in every cell",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        cells = sweep.cells(sweep.read(options.sweep), options.overrides, options.smoke)
        launcher = shlex.split(options.launcher)
        if options.dry_run:
            for cell in cells:
                print(
                    f"{sweep.state(cell):8}  {cell.run_dir}  {shlex.join(cell.command(launcher))}"
                )
            print(f"{len(cells)} cells, {sum(cell.finished for cell in cells)} finished")
            return terminal.reported()
        return sweep.run(cells, launcher, options.continue_on_error)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

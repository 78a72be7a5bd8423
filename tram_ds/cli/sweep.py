"""Runs every cell of a sweep, one after the other, and skips those that are finished.

    tram sweep --sweep table14_xnli_distances.yaml --launcher "deepspeed --num_gpus 8"
    tram sweep --sweep table3_images.yaml --dry-run
    tram sweep --sweep frontier_m2d2.yaml --dry-run --hours h100      # GPU hours, cell by cell

Overrides hold for every cell. Exit codes: 0 done, 2 refused, 75 stopped to be requeued, else the
first failed cell's.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from tram_ds.cli import shared
from tram_ds.runtime import terminal


def options(parser: argparse.ArgumentParser) -> None:
    """Its command line."""
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
        "--hours", metavar="GPU", help="first the hours of the cells to run: a100, h100 or h200"
    )
    parser.add_argument(
        "--continue-on-error",
        action="store_true",
        help="go on with the next cell after a failed one",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="every cell with a tiny model, 3 steps"
    )
    shared.overrides(parser, "recipe keys to change in every cell")


def run(options: argparse.Namespace) -> int:
    """Prints a line per cell; returns the exit code."""
    from tram_ds.jobs import sweep

    cells = sweep.cells(sweep.read(options.sweep), options.overrides, options.smoke)
    if options.hours:
        from tram_ds.jobs import sweep_hours  # it imports torch

        print("\n".join(sweep_hours.lines(cells, options.hours)), flush=True)
    launcher = shlex.split(options.launcher)
    if not options.dry_run:
        return sweep.run(cells, launcher, options.continue_on_error)
    for cell in cells:
        print(f"{sweep.state(cell):8}  {cell.run_dir}  {shlex.join(cell.command(launcher))}")
    print(f"{len(cells)} cells, {sum(cell.finished for cell in cells)} finished")
    return terminal.reported()

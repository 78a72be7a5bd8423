"""The runs of a sweep, and what of it is not there yet."""

from __future__ import annotations

from argparse import Namespace

from tram_ds.comparison.run import CompareError
from tram_ds.jobs import sweep

NAMED = 6  # cells that a note names


def folders(options: Namespace) -> tuple[list[str], list[str]]:
    """(folders of the finished cells, a note of the others). CompareError where none is finished,
    or runs are named beside the sweep."""
    asked = f"--sweep {options.sweep}"
    if options.runs or options.experiment:
        raise CompareError(f"{asked}: names its runs itself: give no folders and no --experiment")
    cells = sweep.cells(sweep.read(options.sweep))
    there = [str(cell.run_dir) for cell in cells if cell.finished]
    missing = [str(cell.run_dir) for cell in cells if not cell.finished]
    if not there:
        raise CompareError(
            f"{asked}: none of its {len(cells)} cells is finished: run launch/sweep.py"
        )
    if not missing:
        return there, []
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    named = ", ".join(missing[:NAMED])
    what = f"{len(missing)} of {len(cells)} cells of {options.sweep} are not finished"
    return there, [f"partial: {what}: {named}{more}"]

"""launch/compare.py's work: finds the runs, compares, and returns the text; writes and logs what
was asked for."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

from tram_ds.comparison import comparison, report, runs, swept
from tram_ds.comparison.render import render
from tram_ds.comparison.run import Run
from tram_ds.runtime.files import refuse_unwritable
from tram_ds.runtime.paths import expanded_uri
from tram_ds.tracking.address import address


def main(options: Namespace, words: Sequence[str]) -> str:
    """The tables as text. words: the command line, for the report. ValueError: nothing to compare,
    or not as asked."""
    if not 0 < options.alpha < 1:
        raise ValueError(f"--alpha {options.alpha}: a probability is needed, e.g. 0.01")
    if options.report:
        refuse_unwritable(options.report / "report.html", "--report")
    found, notes, partial = [], [], []
    uri = address(options.uri and expanded_uri(options.uri, "--uri"), None, "", os.environ).uri
    if options.paper:
        sections = comparison.paper_alone(options.table)
    else:
        patterns, partial = swept.folders(options) if options.sweep else (options.runs, [])
        found, notes = runs.find(patterns, options.experiment, uri, options.split)
        notes += partial
        sections = comparison.compare(
            found, options.table, options.baseline, options.alpha, options.frontier
        )
    chosen = comparison.blocks_of(sections, options.only.split(",") if options.only else None)
    text = render(chosen, options.format, colour=sys.stdout.isatty())
    for note in notes:
        print(note if note in partial else f"left out: {note}", file=sys.stderr)
    command = shlex.join(words)
    if options.report:
        print(f"report: {report.write(sections, options.report, command, notes)}", file=sys.stderr)
    if options.log:
        experiment = options.experiment or _experiment_of(found)
        print(
            f"MLflow run: {report.log(sections, options.report, experiment, uri, command)}",
            file=sys.stderr,
        )
    return text


def _experiment_of(found: Sequence[Run]) -> str:
    """The MLflow experiment of the first run; `paper` without runs."""
    if not found:
        return "paper"
    recipe = found[0].recipe
    return (recipe.get("tracking") or {}).get("experiment") or str(recipe.get("name", "comparison"))

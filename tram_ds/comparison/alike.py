"""Like with like: what a score is measured with, and the runs that were measured alike."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from tram_ds.comparison.measured_with import CHOICE, DATA, scoring
from tram_ds.comparison.runs import Run

DIGEST = "data digest"


def alike(runs: Sequence[Run], columns_are_data: bool, metric: str) -> list[tuple[str, list[Run]]]:
    """(what tells them apart, runs) of every group that was scored alike: "" where there is one.

    columns_are_data: each column is a data set of its own (images), so that only the other keys
    must agree. metric: a score, or an analysis, of which the settings count too.
    """
    left_out = DATA if columns_are_data else ()
    scored = [
        scoring(run.recipe, left_out) | run.resolved | run.settings.get(metric, {}) for run in runs
    ]
    _add_digests(runs, scored)
    differing = sorted(
        key for key in {k for s in scored for k in s} if len({s.get(key) for s in scored}) > 1
    )
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, said in zip(runs, scored, strict=True):
        groups[", ".join(f"{key} = {said.get(key, 'unset')}" for key in differing)].append(run)
    return list(groups.items())


def _add_digests(runs: Sequence[Run], scored: Sequence[dict[str, str]]) -> None:
    """Of runs of one data set and choice of domains, those of other content are unlike. The digest
    covers the chosen domains, so it says nothing between other choices."""
    chosen: dict[str, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        task = run.recipe["task"]
        named = [task.get(key.partition(".")[2]) for key in (*DATA, *CHOICE)]
        chosen[json.dumps([*named, sorted(run.scores)], default=str)].append(i)
    for members in chosen.values():
        digests = {d for i in members if (d := runs[i].tags.get("data_digest"))}
        if len(digests) > 1:
            for i in members:
                scored[i][DIGEST] = runs[i].tags.get("data_digest", "unknown")[:12]

"""Does a measure on the training domain predict the zero-shot domains? (Table 6: in-domain,
zero-shot, and their correlation.)"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One algorithm's line of Table 6.

    in_domain: mean over the training domains and the runs. zero_shot: mean over the other domains
    and the runs;
    zero_shot_std: standard deviation of the domains' means. pearson: correlation, over runs, of
    in_domain with the zero-shot average; pearson_std: standard deviation of its correlations with
    the single domains. None where it is not defined: a correlation needs three runs that differ.
    """

    runs: int
    in_domain: float
    zero_shot: float | None
    zero_shot_std: float | None
    pearson: float | None
    pearson_std: float | None


def transfer(reports: Iterable[Mapping[str, Any]], what: str) -> dict[str, Row]:
    """Algorithm -> its row, from the contents of analysis.json files; those without `what`
    (sharpness, cka, ...) are left out.

    A domain counts where every run of its algorithm has it. ValueError for an algorithm whose runs
    trained on other domains.
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        if any(what in found for found in report["domains"].values()):
            grouped.setdefault(report["algorithm"], []).append(report)
    return {algorithm: _row(algorithm, runs, what) for algorithm, runs in grouped.items()}


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The correlation of two series of equal length; None for fewer than three pairs or a series
    that does not vary."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1 or not all(map(math.isfinite, [*x, *y])):
        return None
    return statistics.correlation(x, y)


def _row(algorithm: str, runs: Sequence[Mapping[str, Any]], what: str) -> Row:
    trained = {tuple(run["train_domains"]) for run in runs}
    if len(trained) > 1:
        raise ValueError(
            f"{what} of {algorithm}: its runs were trained on different domains ({trained}): "
            "compare them apart"
        )
    values = [
        {d: found[what]["value"] for d, found in run["domains"].items() if what in found}
        for run in runs
    ]
    common = [d for d in values[0] if all(v.get(d) is not None for v in values)]
    inside = [d for d in common if d in next(iter(trained))]
    outside = [d for d in common if d not in next(iter(trained))]
    if not inside:
        raise ValueError(
            f"{what} of {algorithm}: no run measured its training domain; add it to --domains"
        )
    per_run = [statistics.fmean(v[d] for d in inside) for v in values]
    if not outside:
        return Row(len(runs), statistics.fmean(per_run), None, None, None, None)
    averages = [statistics.fmean(v[d] for d in outside) for v in values]
    means = [statistics.fmean(v[d] for v in values) for d in outside]
    single = [r for d in outside if (r := pearson(per_run, [v[d] for v in values])) is not None]
    return Row(
        runs=len(runs),
        in_domain=statistics.fmean(per_run),
        zero_shot=statistics.fmean(averages),
        zero_shot_std=statistics.stdev(means) if len(means) > 1 else None,
        pearson=pearson(per_run, averages),
        pearson_std=statistics.stdev(single) if len(single) > 1 else None,
    )

"""The scores of single rows that lie beside scores, where they are of these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from tram_ds.evaluation import row_scores
from tram_ds.evaluation.row_scores import RowScores

Rows = dict[str, RowScores]  # domain -> scores of its rows
Scores = Mapping[str, Mapping[str, float]]
CLOSE = 1e-4  # of a mean loss or an accuracy: rows are kept in fp32


def read(path: Path, groups: Mapping[str, Scores]) -> tuple[dict[str, Rows], list[str]]:
    """(group -> rows of its domains, why they are left out) of the file at `path`, empty where
    there is none. groups: the scores that the rows' must add up to."""
    if not path.is_file():
        return {}, []
    try:
        found = row_scores.read(path)
    except ValueError as error:
        return {}, [str(error).replace(str(path), path.name)]
    for group, scores in groups.items():
        for domain, rows in found.get(group, {}).items():
            if domain in scores and not _adds_up(rows, scores[domain]):
                return {}, [f"{path.name}: its rows of {domain} do not make that domain's score"]
    return found, []


def _adds_up(rows: RowScores, score: Mapping[str, float]) -> bool:
    kept = score.get("accuracy")
    if kept is None:  # a perplexity: null where it is infinite
        shown = score.get("perplexity") or math.nan
        kept = math.log(shown) if 0 < shown < math.inf else math.nan
    return abs(rows.score - kept) <= CLOSE * max(1.0, abs(kept))

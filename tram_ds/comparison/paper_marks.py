"""What a reader of the paper's tables should know of their rows: which are the same numbers, which
are single runs, and which had more compute."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

from tram_ds.algorithms.cost import cost
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.comparison import paper
from tram_ds.comparison.correlation import compared
from tram_ds.comparison.layouts import Layout
from tram_ds.comparison.paper import Frame

ALIKE = 0.75  # share of a row's numbers: rows of different methods share fewer by chance


def identical(scores: Frame) -> list[tuple[str, str, int]]:
    """Pairs of rows that print the same numbers, and in how many columns."""
    found = [
        (str(a), str(b), int((scores.loc[a] == scores.loc[b]).sum()))
        for a, b in combinations(scores.index, 2)
    ]
    return [pair for pair in found if pair[2] >= ALIKE * scores.shape[1]]


def marks(layout: Layout) -> tuple[dict[str, str], list[str]]:
    """(row -> its marks, a footnote for each mark) of the rows that methods are compared by."""
    assert layout.paper is not None
    scores = layout.paper.loc[compared(list(layout.paper.index))]
    of: dict[str, list[str]] = defaultdict(list)
    notes = []
    if pairs := identical(scores):
        said = [f"{a} = {b} in {n} of {scores.shape[1]} numbers" for a, b, n in pairs]
        notes.append(f"a: two methods, one row: {'; '.join(said)}")
        for method in dict.fromkeys(name for a, b, _ in pairs for name in (a, b)):
            of[method].append("a")
    runs = paper.RUNS.get(layout.name)
    if runs == 1:
        notes.append("b: one run a row: the noise of seeds is unknown")
        for method in scores.index:
            of[str(method)].append("b")
    passes = {str(m): _passes(str(m)) for m in scores.index}
    plain = next((p for m, p in passes.items() if m in ("adam", "sgd")), "")
    if more := {m: p for m, p in passes.items() if p != plain}:
        by_cost = defaultdict(list)
        for method, cost_of in more.items():
            by_cost[cost_of].append(method)
            of[method].append("c")
        said = [f"{p} of {', '.join(methods)}" for p, methods in by_cost.items()]
        notes.append(
            f"c: compute is not matched: forward / backward passes a step are {plain} of plain "
            f"training, {'; '.join(said)}"
        )
    if runs and runs > 1:
        notes.append(f"mean over {runs} runs a row")
    return {method: " ".join(letters) for method, letters in of.items()}, notes


def _passes(row: str) -> str:
    """Forward / backward; `tram_x_mmd` is tram_x with another distance."""
    name = row if row in ALGORITHMS else row.rpartition("_")[0]
    step = cost({"name": name if name in ALGORITHMS else "base"})
    return f"{step.forward:g} / {step.backward:g}"

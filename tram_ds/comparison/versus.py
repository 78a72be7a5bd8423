"""The blocks that set methods against each other: tests against a baseline, and how zero-shot
follows in-domain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from tram_ds.comparison import significance as tests
from tram_ds.comparison.blocks import NONE, Block, Cell, number
from tram_ds.comparison.collect import Table
from tram_ds.comparison.layouts import sorted_methods
from tram_ds.comparison.row_draws import Draws
from tram_ds.comparison.transfer import pearson

NO_ROWS = Draws()
FEW = 5  # seeds: of fewer a bootstrap interval is too narrow to be shown


def baseline_of(table: Table, wanted: str | None) -> str:
    """The method others are tested against: the one wanted, else plain training, else the first.
    ValueError if unknown."""
    there = list(table.means().index)
    if wanted is not None:
        named = [
            m for m in there if m == wanted or (wanted == "base" and m in ("sgd", "adam", "adamw"))
        ]
        if not named:
            raise ValueError(f"--baseline {wanted}: no such row; there are {', '.join(there)}")
        return named[0]
    return next(
        (m for m in sorted_methods(there) if m.partition(" (")[0] in ("sgd", "adam", "adamw")),
        table.methods[0],
    )


def significance(table: Table, baseline: str, alpha: float, drawn: Draws = NO_ROWS) -> Block:
    """Every method against the baseline: the paper's test over domains, and bootstrap and Wilcoxon
    paired by seed. drawn: the scores where test rows are drawn anew, resampled with the seeds."""
    layout, means = table.layout, table.means()
    methods = [m for m in means.index if m != baseline]
    by_domain = []
    for method in methods:
        pair = means.loc[[method, baseline], [c for c in means if c in layout.zero_shot]].dropna(
            axis=1
        )
        test = tests.ks if layout.test == "ks" else tests.wilcoxon
        by_domain.append(test(pair.loc[method].tolist(), pair.loc[baseline].tolist(), alpha))
    corrected = tests.holm([verdict.p for verdict in by_domain])
    rows = []
    for method, verdict, holm in zip(methods, by_domain, corrected, strict=True):
        found = Cell(verdict.text(alpha), math.nan if verdict.p is None else verdict.p)
        last = Cell(tests.p_text(holm), math.nan if holm is None else holm)
        rows.append((method, [*_by_seed(table, method, baseline, alpha, drawn), found, last]))
    test = "Kolmogorov-Smirnov" if layout.test == "ks" else "Wilcoxon"
    columns = (
        f"Δ {layout.summary}",
        f"95 % bootstrap, {drawn.drawn}",
        f"bootstrap, {drawn.drawn}",
        "Wilcoxon, seeds",
        f"{test}, domains",
        "Holm p",
    )
    better = "below" if layout.lower_is_better else "above"
    notes = (
        f"better is {better} zero; * is p < {alpha:g}, uncorrected; Holm: the last test, "
        "corrected for all rows",
        f"by seed, n pairs cannot give p below 2^(1-n): {tests.pairs_needed(alpha)} seeds are "
        f"needed for p < {alpha:g}",
        f"the bootstrap resamples the seeds that both rows have, in pairs{_and_rows(drawn)}; below "
        f"{FEW} of them no interval is shown",
        *(("bootstrap: of the ratio of perplexities, in percent",) if layout.log else ()),
        f"{test} is the paper's test; it does not say of which samples: here, mean scores of the "
        "zero-shot domains",
    )
    return Block("significance", f"{layout.title}: against {baseline}", columns, rows, notes)


def _and_rows(drawn: Draws) -> str:
    if not drawn.scores:
        return ""
    return (
        ", and the rows of the test sets, the same for both (the pre-trained row has no scores of "
        "rows: there, seeds alone)"
    )


def _differences(
    table: Table, pair: tuple[str, str], seeds: Sequence[int], drawn: Draws
) -> np.ndarray | None:
    """(draws, seeds) of the summary, paired; None where rows are not known."""
    columns = [c for c in table.values if c in table.layout.zero_shot]
    keys = [[(method, seed, 1.0) for seed in seeds] for method in pair]
    known = all(key in drawn.scores for of in keys for key in of)
    if not (known and seeds and columns):
        return None
    first, second = (
        np.stack([drawn.of(key, columns).mean(axis=1) for key in of], 1) for of in keys
    )
    found = np.log(first) - np.log(second) if table.layout.log else first - second
    return found[np.isfinite(found).all(axis=1)]


def _by_seed(table: Table, method: str, baseline: str, alpha: float, drawn: Draws) -> list[Cell]:
    name = table.layout.summary
    both = pd.concat(
        [table.of(method)[name].rename("a"), table.of(baseline)[name].rename("b")],
        axis=1,
        join="inner",
    ).dropna()
    a, b = both["a"].tolist(), both["b"].tolist()
    means = table.means()[name]
    digits = max(2, table.layout.digits)
    delta = number(
        # over the seeds that both have; without a common one there are only the means
        float(np.mean(both["a"] - both["b"])) if a else float(means[method] - means[baseline]),
        digits,
        sign=True,
    )
    log = table.layout.log
    compared = [np.log(values).tolist() if log else values for values in (a, b)]
    rows = _differences(table, (method, baseline), [int(s) for s in both.index], drawn)
    rows = rows if rows is not None and len(rows) else None
    interval, verdict = tests.bootstrap(compared[0], compared[1], alpha, rows=rows)
    ranked = tests.wilcoxon(a, b, alpha, of="seeds")
    shown = NONE
    if interval and len(a) >= FEW:
        bounds = (interval.low, interval.high)
        # a difference of logarithms as percent of the baseline's perplexity
        low, high = (100 * math.expm1(x) if log else x for x in bounds)
        shown = f"[{low:+.{digits}f}{' %' * log}, {high:+.{digits}f}{' %' * log}]"
    return [
        delta,
        Cell(shown),
        *(Cell(v.text(alpha), math.nan if v.p is None else v.p) for v in (verdict, ranked)),
    ]


def transfer(table: Table) -> Block:
    """Table 6: a measure in-domain and zero-shot, its deviation over domains, and how the one
    follows the other over seeds."""
    layout = table.layout
    outside = [c for c in table.values if c in layout.zero_shot]
    assert layout.train is not None
    rows = []
    for method in table.methods:
        values = table.of(method)
        inside = values[layout.train].tolist()
        rho = pearson(inside, values[layout.summary].tolist())
        single = [r for d in outside if (r := pearson(inside, values[d].tolist())) is not None]
        numbers = (
            float(np.mean(inside)),
            float(values[layout.summary].mean()),
            float(values[outside].mean().std()),
        )
        correlation = (
            math.nan if rho is None else rho,
            float(np.std(single, ddof=1)) if len(single) > 1 else math.nan,
        )
        rows.append(
            (
                method,
                [
                    Cell(str(len(values)), len(values)),
                    *(number(v, 2) for v in (*numbers, *correlation)),
                ],
            )
        )
    columns = ("seeds", layout.train, "zs_avg", "zs_std", "pearson", "pearson_std")
    notes = (
        "zs_std: over domains; pearson: in-domain with zs_avg over seeds (3 needed), its "
        "deviation over domains",
    )
    return Block("transfer", layout.title, columns, rows, notes)

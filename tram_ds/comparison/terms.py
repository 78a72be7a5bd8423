"""What the columns of a comparison say, in words: shown on hover, and in the report's legend."""

from __future__ import annotations

from dataclasses import replace

from tram_ds.comparison.blocks import Block
from tram_ds.comparison.layouts import Layout

TERMS = {
    "seeds": "runs of the method with different random numbers",
    "in-domain": "mean score on the domain trained on",
    "out-of-domain": "zero-shot average: mean score over the domains never trained on",
    "average": "mean score over the columns",
    "geometric": "geometric mean over domains and seeds",
    "95 % interval": "t interval of the mean over seeds: where another seed's mean is expected",
    "worst domain": "the domain with the worst score of those never trained on",
    "worst": "the score on the worst domain",
    "gap": "how much better the score on the domain trained on is than the zero-shot average",
    "95 % bootstrap, seeds": "interval of the difference to the baseline, seeds resampled in pairs",
    "bootstrap, seeds": "p that the difference to the baseline is chance, seeds resampled in pairs",
    "95 % bootstrap, seeds and rows": "the same, with the rows of the test sets resampled too",
    "bootstrap, seeds and rows": "the same, with the rows of the test sets resampled too",
    "Wilcoxon, seeds": "p of the signed-rank test, paired by seed",
    "Wilcoxon, domains": "p of the signed-rank test, paired by domain: the paper's test",
    "Kolmogorov-Smirnov, domains": "p that both rows' domains have one distribution: the paper's",
    "Holm p": "the test over domains, corrected for the number of rows",
    "epochs": "passes over the training rows",
    "tokens": "targets that the loss counted: predicted tokens, or examples of a classification",
    "passes": "forward / backward passes of one step",
    "FLOP": "training FLOP relative to the baseline, from the passes",
    "GPU hours": "seconds of training times GPUs",
    "rank hours": "seconds of training times processes",
    "gain": "improvement over the pre-trained model, or over the baseline without one",
    "gain / FLOP": "gain divided by the relative FLOP",
    "gain / hour": "gain per hour of all devices",
    "loss, equal FLOP": "in-domain loss after as much compute as the cheapest run took in all",
    "rho": "Pearson's correlation with the training domain, over methods",
    "p < 0.01": "is that correlation significant?",
    "methods": "how many methods it is computed over",
    "paper": "the paper's number",
    "slope, earlier": "slope of the line through the earlier methods",
    "rho, earlier": "correlation among the earlier methods",
    "slope, TRAM": "slope of the line through the TRAM variants",
    "rho, TRAM": "correlation among the TRAM variants",
    "TRAM below the line": "mean distance of the TRAM variants below the earlier methods' line",
    "off the line": "zero-shot average off the line of the other rows at its in-domain score",
    "t": "that distance by the standard error of a prediction of the line",
    "marks": "what to know of the row: see the notes",
    "printed": "the average that the paper prints",
    "recomputed": "the average of the columns that the paper prints",
    "differs": "do they differ by more than rounding?",
    "zs_std": "deviation of the means over the domains never trained on",
    "pearson": "correlation of the score on the training domain with the average, over seeds",
    "pearson_std": "deviation over domains of that correlation with each domain",
    "zs_avg": "zero-shot average: unweighted mean over the domains never trained on",
    "avg": "unweighted mean over the columns",
}


def explained(block: Block, layout: Layout) -> Block:
    """The block with the meaning of each of its columns; those it has stay."""
    own = block.meanings
    meanings = {name: own.get(name) or _meaning(name, layout) for name in block.columns}
    return replace(block, meanings=meanings)


def _meaning(column: str, layout: Layout) -> str:
    if column.startswith("Δ "):
        return f"difference of {column.removeprefix('Δ ')} to the baseline, over common seeds"
    if column not in layout.domains:
        return TERMS[column]
    full = next((name for name, short in layout.names.items() if short == column), column)
    if layout.train is None:
        return f"{layout.metric} on {full}, trained on its own training set"
    trained = column == layout.train or column in layout.also_trained
    return (
        f"{layout.metric} on {full}, {'trained on' if trained else 'never trained on: zero-shot'}"
    )

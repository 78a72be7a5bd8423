"""The numbers the paper prints (arXiv 2310.03646), one CSV per table, to hold ours against.

Rows are named as in ALGORITHMS; `adam` and `sgd` are the row `base` with that optimizer,
`pretrained` is the model before fine-tuning. Perplexities are per token, accuracies in percent. The
first column is the training domain; `zs_avg` is the unweighted mean of the others.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pandas as pd

Frame = Any  # a pandas.DataFrame: pandas' own annotations are too wide for a type checker
Column = Any  # a pandas.Series

TITLES = {
    "m2d2_s2orc": "Tables 4 and 11, M2D2 S2ORC perplexity, GPT-2",
    "m2d2_wiki": "Tables 4 and 11, M2D2 Wikipedia perplexity, GPT-2",
    "gpt2xl": "Table 10, M2D2 S2ORC perplexity, GPT2-XL",
    "xnli": "Tables 5 and 12, XNLI accuracy (%)",
    "vision": "Table 3, image classification, top-1 accuracy (%)",
    "distance": "Table 14, XNLI accuracy (%) of TRAM-x by distance",
    "sharpness": "Table 6a, XNLI epsilon-sharpness",
    "cka": "Table 6b, XNLI CKA against the pre-trained model",
}

# models that the numbers are of, by the last part of their name on the hub
MODELS = {
    "m2d2_s2orc": "gpt2",
    "m2d2_wiki": "gpt2",
    "gpt2xl": "gpt2-xl",
    "xnli": "xlm-roberta-base",
    "distance": "xlm-roberta-base",
}
# seeds that the numbers are means of, where the paper says so
RUNS = {"m2d2_s2orc": 1, "m2d2_wiki": 1, "gpt2xl": 1, "xnli": 20, "vision": 5, "distance": 20}


def read(name: str) -> Frame:
    """A file of paper_tables/ by its stem, as it is."""
    return pd.read_csv(
        files("tram_ds.comparison").joinpath("paper_tables", f"{name}.csv").open(encoding="utf-8")
    )


def table(name: str) -> Frame:
    """method -> its scores; a column per domain, then `zs_avg` where the paper prints one. Spreads
    are left out."""
    if name not in TITLES:
        raise ValueError(f"the paper has no table {name!r} here: choose one of {', '.join(TITLES)}")
    scores = read(name).set_index("method")
    return scores.drop(
        columns=[c for c in scores if c.endswith(("_ci95", "_std")) or c.startswith("pearson")]
    )


def spread(name: str) -> Frame | None:
    """method -> what the paper prints after a plus-minus: 95 % intervals (vision) or deviations
    over seeds (xnli)."""
    if name == "vision":
        scores = read(name).set_index("method").filter(like="_ci95")
        return scores.rename(columns=lambda column: column.removesuffix("_ci95"))
    return read("xnli_std").set_index("method") if name == "xnli" else None


def correlations(split: str) -> Frame:
    """Table 9 for `s2orc` or `wiki`: domain -> pearson_to_train, significant_p01, stem (1, 0, or
    NaN where not said)."""
    rows = read("domain_correlation")
    return rows[rows["split"] == split].drop(columns="split").set_index("domain")

"""The tables that can be printed: the paper's, and whatever the runs' own domains make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tram_ds.comparison import paper
from tram_ds.comparison.paper import Frame
from tram_ds.data.m2d2_names import PAPER, short_names

Test = Literal["ks", "wilcoxon"]
TABLES = tuple(paper.TITLES)
SPLITS = {"m2d2_s2orc": "s2orc", "gpt2xl": "s2orc", "m2d2_wiki": "wiki"}  # table -> M2D2's split
METRICS = {
    "xnli": "accuracy",
    "vision": "accuracy",
    "distance": "accuracy",
    "sharpness": "sharpness",
    "cka": "cka",
}
ORDER = (  # rows appear in this order, others after them by name
    "pretrained",
    "sgd",
    "adam",
    "adamw",
    "sam",
    "asam",
    "fsam",
    "functional_sam",
    "trpo",
    "r3f",
    "mesa",
    "kl_init",
    "l2sp",
    "msam",
    "rwp",
    "asam_trpo",
    "asam_r3f",
    "asam_mesa",
    "tram_prev",
    "tram_init",
    "tram_x",
    "tram_x_kl",
    "tram_x_mmd",
    "tram_x_l2",
    "tram_fisher",
)


@dataclass(frozen=True)
class Layout:
    """A table: its columns and how they are judged.

    train: the column trained on; None where every column is a task of its own (images). domains:
    all columns, train
    first. test: what the paper compares methods with. paper: its numbers. digits: decimals printed.
    also_trained: further columns that are not zero-shot. names: domain -> its column, where that is
    not its name.
    """

    name: str
    title: str
    metric: str
    domains: tuple[str, ...]
    train: str | None
    test: Test
    paper: Frame | None = None
    digits: int = 1
    also_trained: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def column(self, domain: str) -> str:
        """The column of a domain."""
        return self.names.get(domain, domain)

    @property
    def zero_shot(self) -> tuple[str, ...]:
        """The columns the summary averages."""
        return tuple(d for d in self.domains if d != self.train and d not in self.also_trained)

    @property
    def summary(self) -> str:
        """The name of that average."""
        return "avg" if self.train is None else "zs_avg"

    @property
    def lower_is_better(self) -> bool:
        return self.metric in ("perplexity", "loss", "sharpness")

    @property
    def log(self) -> bool:
        """Are means and intervals taken of logarithms?"""
        return self.metric == "perplexity"

    @property
    def gain(self) -> int:
        """What a difference is multiplied by for positive to mean better."""
        return -1 if self.lower_is_better else 1


def paper_layout(name: str) -> Layout:
    """One of TABLES. ValueError for another name."""
    numbers = paper.table(name)
    domains = tuple(column for column in numbers if column not in ("zs_avg", "avg"))
    metric = METRICS.get(name, "perplexity")
    digits = 2 if name in ("vision", "sharpness", "cka") else 1
    train = None if name == "vision" else domains[0]
    test: Test = "ks" if metric == "perplexity" else "wilcoxon"
    names = {config: short.lower() for short, config in PAPER.get(SPLITS.get(name, ""), {}).items()}
    title = paper.TITLES[name]
    return Layout(name, title, metric, domains, train, test, numbers, digits, names=names)


def own_layout(title: str, metric: str, domains: Sequence[str], trained: Sequence[str]) -> Layout:
    """The table of runs the paper has none for. Where every domain was trained on, the summary is
    their plain average."""
    names = short_names(domains)
    domains, trained = list(names.values()), [names[d] for d in trained if d in names]
    trained = trained if len(trained) < len(domains) else []
    ordered = (*trained, *(d for d in domains if d not in trained))
    percent = " (%)" if metric == "accuracy" else ""
    what = f"{title}, {metric}{percent}" + (f", trained on {', '.join(trained)}" if trained else "")
    test: Test = "ks" if metric == "perplexity" else "wilcoxon"
    train = trained[0] if trained else None
    return Layout(
        "auto",
        what,
        metric,
        ordered,
        train,
        test,
        digits=2,
        also_trained=tuple(trained[1:]),
        names=names,
    )


def sorted_methods(names: Sequence[str]) -> list[str]:
    """In the paper's order; variants, `sam (rho=0.1)`, beside their row, by their numbers."""

    def place(name: str) -> tuple[int, list[str | float]]:
        row = name.partition(" (")[0]
        # text and numbers by turns: 1e-05 is before 0.0001
        parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
        key = [float(part) if i % 2 else part for i, part in enumerate(parts)]
        return ORDER.index(row) if row in ORDER else len(ORDER), key

    return sorted(names, key=place)

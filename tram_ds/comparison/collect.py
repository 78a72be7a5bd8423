"""The scores of runs as the numbers of a table: a row per method and seed, a column per domain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from tram_ds.comparison.alike import alike
from tram_ds.comparison.labels import labels
from tram_ds.comparison.layouts import Layout, own_layout, paper_layout, sorted_methods
from tram_ds.comparison.paper import Column, Frame
from tram_ds.comparison.run import ANALYSES, CompareError, Run
from tram_ds.data.m2d2_names import ABBREVIATIONS, short_names

# tables of the paper that `auto` recognises
BY_NAME = ("gpt2xl", "m2d2_s2orc", "m2d2_wiki", "xnli")
SAME_START = 1e-3  # relative difference of scores that other hardware or batch sizes can make


def parts(runs: Sequence[Run], name: str) -> list[tuple[Layout, list[Run]]]:
    """The tables to print and the runs of each: the named one, or with `auto` what the runs' data
    call for.

    CompareError if no run fits the one named. Runs of different recipes are tables of their own,
    but for images.
    """
    if name != "auto":
        layout = _analysed(runs, paper_layout(name)) if name in ANALYSES else paper_layout(name)
        return _apart([(layout, select(runs, layout))])
    known: dict[str, list[Run]] = defaultdict(list)
    own: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if (layout := _known(run)) is not None:
            known[layout.name].append(run)
        elif run.metric == "accuracy" and len(run.scores) == 1:
            own["images",].append(run)
        else:
            own[str(run.recipe.get("name")), run.metric, *run.train_domains].append(run)
    images = paper_layout("vision")
    found = [(paper_layout(name), members) for name, members in known.items()]
    for members in own.values():
        domains = list(
            dict.fromkeys(domain for run in members for domain in run.domains(run.metric))
        )
        trained = [] if len(members[0].scores) == 1 else list(members[0].train_domains)
        vision = (
            not trained and members[0].metric == "accuracy" and set(domains) <= set(images.domains)
        )
        title = str(members[0].recipe.get("name"))
        found.append(
            (images if vision else own_layout(title, members[0].metric, domains, trained), members)
        )
    return _apart(found)


def _apart(found: Sequence[tuple[Layout, list[Run]]]) -> list[tuple[Layout, list[Run]]]:
    """A table for each way its runs were scored; the title says which."""
    tables = []
    for layout, members in found:
        for told, group in alike(members, layout.train is None, layout.metric):
            title = f"{layout.title}; {told}" if told else layout.title
            tables.append((replace(layout, title=title), group))
    return tables


def _analysed(runs: Sequence[Run], layout: Layout) -> Layout:
    """Sharpness or CKA: the columns are what the runs were analysed on; the paper's numbers are
    those of XNLI."""
    there = [run for run in runs if run.analyses.get(layout.metric)]
    if not there:
        raise CompareError(
            f"--table {layout.name}: no run has analysis/{layout.name}.json: run "
            "launch/analyze.py on them first"
        )
    trained = there[0].train_domains[0]
    domains = dict.fromkeys(d for run in there for d in run.domains(layout.metric))
    names = short_names([trained, *domains])
    train = names[trained]
    ordered = (train, *(names[d] for d in domains if d != trained))
    also = tuple(names[d] for d in there[0].train_domains[1:])
    own = layout.paper if train == layout.train and not also else None
    return replace(layout, domains=ordered, train=train, also_trained=also, paper=own, names=names)


def _known(run: Run) -> Layout | None:
    """The paper's table a run belongs to by its data, not by a likeness of names."""
    # its made-up languages are en, sw and ur too, and would be held against the paper's XNLI
    if run.recipe["task"].get("data") == "generated":
        return None
    # by the data set's own names: column() leaves others as they are, so that somebody's folder
    # called `math` would be a column of S2ORC
    if run.metric == "perplexity" and not set(run.scores) <= set(ABBREVIATIONS):
        return None
    return next((layout for layout in map(paper_layout, BY_NAME) if _fits(run, layout)), None)


def select(runs: Sequence[Run], layout: Layout) -> list[Run]:
    """The runs that belong into a table. CompareError if there is none."""
    chosen = [run for run in runs if _fits(run, layout, more=True)]
    if not chosen:
        seen = sorted({f"{r.metric} trained on {', '.join(r.train_domains)}" for r in runs})
        wanted = (
            f"{layout.metric}, trained on {layout.train or 'one of ' + ', '.join(layout.domains)}"
        )
        raise CompareError(
            f"--table {layout.name}: no run fits ({wanted}); there are runs of {'; '.join(seen)}"
        )
    return chosen


def _fits(run: Run, layout: Layout, more: bool = False) -> bool:
    """more: may the run have further domains, which the table leaves out?"""
    # a column that one run trained on is zero-shot to another: never in one average
    trained = {layout.column(d) for d in run.train_domains} & set(layout.domains)
    same = trained == {layout.train, *layout.also_trained}
    if layout.metric in ANALYSES:
        return bool(run.analyses.get(layout.metric)) and same
    columns = {layout.column(d) for d in run.scores}
    if run.metric != layout.metric or not columns & set(layout.domains):
        return False
    if layout.train is None:
        return len(run.scores) == 1
    # GPT-2 and GPT2-XL have the same columns: the model alone tells their tables apart
    large = "gpt2-xl" in str(run.recipe["model"].get("path"))
    if layout.name in ("gpt2xl", "m2d2_s2orc", "m2d2_wiki") and large != (layout.name == "gpt2xl"):
        return False
    if layout.name == "distance" and run.recipe["algorithm"]["name"] != "tram_x":
        return False
    return (more or columns <= set(layout.domains)) and same


@dataclass(frozen=True)
class Table:
    """The numbers of a layout. values: one row per (method, seed), a column per domain and the
    summary.

    runs: method -> its runs. pretrained: the same columns before training; None where no run
    measured it.
    """

    layout: Layout
    values: Frame
    runs: dict[str, list[Run]]
    pretrained: Column | None
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        return list(self.runs)

    def of(self, method: str) -> Frame:
        """seed -> scores of a method; `pretrained` counts as one with the same score for every
        seed."""
        if method == "pretrained" and self.pretrained is not None:
            seeds = sorted(set(self.values.index.get_level_values("seed")))
            return pd.DataFrame([self.pretrained] * len(seeds), index=pd.Index(seeds, name="seed"))
        return self.values.loc[method]

    def means(self) -> Frame:
        """method -> mean over seeds, pre-trained first."""
        means = self.values.groupby(level="method").mean().loc[self.methods]
        return (
            means
            if self.pretrained is None
            else pd.concat([self.pretrained.to_frame("pretrained").T, means])
        )


def gather(runs: Sequence[Run], layout: Layout) -> Table:
    """The numbers of these runs. Of runs of one method and seed the newest counts, and a note says
    so."""
    names, notes = labels(runs, layout)
    rows: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    kept: dict[tuple[str, int, tuple[str, ...]], Run] = {}
    # the oldest first: a later run of the same key writes over it below
    for run, method in sorted(zip(runs, names, strict=True), key=lambda pair: pair[0].order):
        # images: a row has a run for each data set, and none of these is another's double
        key = (method, run.seed, tuple(run.domains(layout.metric)) if layout.train is None else ())
        if key in kept:
            notes.append(
                f"{method}, seed {run.seed}: {kept[key].where} is older than {run.where} and left "
                "out"
            )
        kept[key] = run
        rows[method, run.seed] |= run.values(layout.metric, layout.column)
    by_method: dict[str, list[Run]] = defaultdict(list)
    for (method, _, _), run in kept.items():
        by_method[method].append(run)
    order = sorted_methods(list(by_method))
    keys = sorted(rows, key=lambda key: (order.index(key[0]), key[1]))
    index = pd.MultiIndex.from_tuples(keys, names=["method", "seed"])
    values = pd.DataFrame([rows[key] for key in keys], index=index)
    columns = [domain for domain in layout.domains if domain in values]
    pretrained, doubt = _before(list(kept.values()), layout, columns)
    by = {method: sorted(by_method[method], key=lambda run: run.seed) for method in order}
    return Table(layout, with_summary(values[columns], layout), by, pretrained, (*notes, *doubt))


def _before(
    runs: Sequence[Run], layout: Layout, columns: Sequence[str]
) -> tuple[Column | None, list[str]]:
    """(the pre-trained model's scores, a note): None where no run measured them, or where the runs
    began differently."""
    before = pd.DataFrame(
        [run.values(layout.metric, layout.column, run.initial) for run in runs if run.initial]
    ).reindex(columns=columns)
    # of an analysis values() has the trained model's numbers, whatever scores it is given
    if before.empty or layout.metric in ANALYSES:
        return None, []
    if ((before.max() - before.min()) > SAME_START * before.mean().abs()).any():
        return None, ["no pre-trained row: the runs began with models of different scores"]
    return with_summary(before.mean().to_frame("pretrained").T, layout).iloc[0], []


def with_summary(values: Frame, layout: Layout) -> Frame:
    """The columns and their summary: the unweighted mean of those not trained on; NaN where one of
    them is missing."""
    averaged = [column for column in values if column in layout.zero_shot]
    return values.assign(
        **{layout.summary: values[averaged].mean(axis=1, skipna=False) if averaged else math.nan}
    )

"""XNLI: pairs of sentences with one of three labels, by language; the hub's layout, or a folder
with the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tram_ds.data.hub import hub_files
from tram_ds.data.sources import check_domain_name, refuse_revision, unknown_domain
from tram_ds.data.tables import Table, check_whole, find_parquet, open_table
from tram_ds.runtime.errors import DataError

HUB_IDS = ("facebook/xnli", "xnli")
LANGUAGES = (
    "en",
    "ar",
    "bg",
    "de",
    "el",
    "es",
    "fr",
    "hi",
    "ru",
    "sw",
    "th",
    "tr",
    "ur",
    "vi",
    "zh",
)
SPLITS = ("train", "validation", "test")
COLUMNS = ("premise", "hypothesis", "label")
LABELS = ("entailment", "neutral", "contradiction")
LAYOUT = (
    "<language>/{train,validation,test}*.parquet with columns premise, hypothesis and label "
    "(0, 1 or 2)"
)


class Pairs:
    """Sentence pairs by language and split, from a folder (`root`) or from the hub (`repo`)."""

    def __init__(
        self,
        data: str,
        root: Path | None,
        cache_dir: str | os.PathLike[str] | None,
        revision: str | None = None,
    ) -> None:
        self.data, self.root, self.cache_dir, self.revision = data, root, cache_dir, revision
        if root is not None and not self.languages():
            there = ", ".join(sorted(path.name for path in root.iterdir())[:40]) or "nothing"
            raise DataError(
                f"data folder {root} has no language: expected {root}/{LAYOUT}, found {there}"
            )

    def languages(self) -> list[str]:
        """English first, the others sorted."""
        if self.root is None:
            return list(LANGUAGES)
        folders = [
            path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")
        ]
        names = [
            path.name for path in folders if any(find_parquet(path, split) for split in SPLITS)
        ]
        # where task.train is null the first is trained on, and only English has text that nobody
        # translated by machine
        return sorted(names, key=lambda name: (name != "en", name))

    def splits(self, language: str) -> list[str]:
        """The splits a language has."""
        self._check(language)
        if self.root is None:
            return list(SPLITS)
        return [split for split in SPLITS if find_parquet(self.root / language, split)]

    def open(self, languages: Sequence[str], split: str) -> Table:
        """Rows (premise, hypothesis, label) of some languages, one after the other. DataError for a
        bad label."""
        table = open_table(
            [path for name in languages for path in self._files(name, split)],
            COLUMNS,
            self.cache_dir,
        )
        where = f"{split} of {', '.join(languages)} in {self.data}"
        _check_types(table, where)
        labels = table.column("label").to_numpy()
        if labels.min() < 0 or labels.max() >= len(LABELS):
            found = f"labels from {labels.min()} to {labels.max()}"
            raise DataError(
                f"{where}: {found}, but only 0 entailment, 1 neutral and 2 contradiction exist"
            )
        return table

    def _check(self, language: str) -> None:
        check_domain_name(language)
        if language not in self.languages():
            raise unknown_domain(language, self.languages(), f"task.data {self.data}")

    def _files(self, language: str, split: str) -> list[Path]:
        if split not in self.splits(language):
            there = ", ".join(self.splits(language))
            raise DataError(
                f"language '{language}' of {self.data} has no {split} split; it has {there}"
            )
        if self.root is not None:
            return find_parquet(self.root / language, split)
        instead = f"set task.data to a folder that holds {LAYOUT}"
        files = hub_files(HUB_IDS[0], f"{language}/{split}-*.parquet", self.revision, instead)
        check_whole(files)
        return files


def open_pairs(data: str, cache_dir: str | os.PathLike[str] | None, revision: str | None) -> Pairs:
    """The pairs called `data`: "generated", facebook/xnli, or a folder. DataError for anything
    else."""
    path = Path(data)
    if data in HUB_IDS and not path.is_dir():
        return Pairs(data, None, cache_dir, revision)
    refuse_revision(data, revision)
    if data == "generated":
        from tram_ds.data.generated_tables import pairs_folder

        return Pairs(data, pairs_folder(cache_dir), cache_dir)
    if not path.is_dir():
        raise DataError(
            f"task.data '{data}' is neither 'generated', '{HUB_IDS[0]}' nor a folder on this "
            "machine; give a folder "
            f"that holds {LAYOUT}"
        )
    return Pairs(data, path, cache_dir)


def _check_types(table: Table, where: str) -> None:
    schema = table.table.schema
    for name in COLUMNS[:2]:
        if str(schema.field(name).type) not in ("string", "large_string", "string_view"):
            raise DataError(
                f"{where}: column {name} holds {schema.field(name).type}, not text; use one "
                "language's files"
            )
    if "int" not in str(schema.field("label").type):
        raise DataError(f"{where}: column label holds {schema.field('label').type}, not 0, 1 or 2")
    names = table.names.get("label")
    if names is not None and names != list(LABELS):
        raise DataError(
            f"{where}: the labels are called {', '.join(names)}; expected {', '.join(LABELS)}, in "
            "this order"
        )

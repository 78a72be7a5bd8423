"""Labelled images: CIFAR-100, Stanford Cars and Oxford Flowers from the hub, or any folder of
parquet files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from tram_ds.data.hub import hub_files
from tram_ds.data.pictures import decode, first_broken, refuse
from tram_ds.data.sources import refuse_alike, refuse_reserved, refuse_revision, some
from tram_ds.data.tables import Table, class_names, find_parquet, open_table, read_schema
from tram_ds.runtime.errors import DataError

SPLITS = ("train", "validation", "test")
LAYOUT = "{train,test}*.parquet with an image column and a label column"
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


@dataclass(frozen=True)
class ImageSet:
    """A data set on the hub. repositories, files, rows: by split; classes: how many labels it
    has."""

    name: str
    image: str
    label: str
    classes: int
    repositories: Mapping[str, str]
    files: Mapping[str, str]
    rows: Mapping[str, int]


# task.data -> what the hub holds under it; no commit is known to be good for ever, so none is
# pinned
IMAGE_SETS = {
    "uoft-cs/cifar100": ImageSet(
        name="cifar100",
        image="img",
        label="fine_label",
        classes=100,
        repositories={"train": "uoft-cs/cifar100", "test": "uoft-cs/cifar100"},
        files={"train": "cifar100/train-*.parquet", "test": "cifar100/test-*.parquet"},
        rows={"train": 50_000, "test": 10_000},
    ),
    "Multimodal-Fatima/StanfordCars_train": ImageSet(
        name="cars",
        image="image",
        label="label",
        classes=196,
        repositories={
            "train": "Multimodal-Fatima/StanfordCars_train",
            "test": "Multimodal-Fatima/StanfordCars_test",
        },
        files={"train": "data/train-*.parquet", "test": "data/test-*.parquet"},
        rows={"train": 8_144, "test": 8_041},
    ),
    "nelorth/oxford-flowers": ImageSet(
        name="flowers",
        image="image",
        label="label",
        classes=102,
        repositories={"train": "nelorth/oxford-flowers", "test": "nelorth/oxford-flowers"},
        files={"train": "data/train-*.parquet", "test": "data/test-*.parquet"},
        rows={"train": 7_169, "test": 1_020},
    ),
}


class Images(Sequence[tuple[Image.Image, int]]):
    """Rows (RGB image, class), decoded when asked for. classes: name of each class."""

    def __init__(self, table: Table, labels: np.ndarray, classes: list[str], where: str) -> None:
        self.table, self.labels, self.classes, self.where = table, labels, classes, where

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image = self._decoded(index)
        if isinstance(image, str):
            raise DataError(f"{self.where}: {image}")
        return image, int(self.labels[index])

    def check(self, cache_dir: str | os.PathLike[str] | None) -> None:
        """DataError for the first picture that is missing or cannot be decoded; all are tried."""

        def fault(row: int) -> str | None:
            image = self._decoded(row)
            return image if isinstance(image, str) else None

        refuse(self.where, first_broken(len(self), fault, self.table.digest, cache_dir))

    def _decoded(self, row: int) -> Image.Image | str:
        """The picture, or what is wrong with it."""
        stored = self.table[row][0]
        data = stored["bytes"] if isinstance(stored, dict) else stored
        name = stored.get("path") if isinstance(stored, dict) else None
        called = f"row {row}" + (f" ({name})" if name else "")
        if not data:
            return f"{called} names a file but holds no image; store the images' bytes"
        try:
            return decode(data)
        except ValueError as error:
            return f"the image of {called} cannot be decoded: {error}"


class ImageSource:
    """The splits of one data set. name: what its scores are called. classes: names of the labels,
    by number."""

    def __init__(
        self, data: str, cache_dir: str | os.PathLike[str] | None, revision: str | None
    ) -> None:
        path = Path(data)
        self.data, self.cache_dir = data, cache_dir
        self.known = None if path.is_dir() else IMAGE_SETS.get(data)
        self.root = None if self.known else _folder(data, path, cache_dir)
        if self.known is None:
            refuse_revision(data, revision)
        train, _, test = (revision or "").partition(",")
        self.revisions: dict[str, str] = {"train": train, "test": test or train}
        self.name = self.known.name if self.known else path.resolve().name
        refuse_reserved(self.name)
        # of the train split, whose every other split is read like: the column, and what it holds
        self.label, self.texts = "", False
        self.classes: list[str] = []
        self.classes = self.open("train").classes

    def splits(self) -> list[str]:
        """The splits there are."""
        if self.known:
            return list(self.known.files)
        return [split for split in SPLITS if self.root and find_parquet(self.root, split)]

    def open(self, split: str) -> Images:
        """The rows of a split. DataError for what is missing, an unknown label, or another number
        of rows than known."""
        files = self._files(split)
        schema = read_schema(files[0])
        image, label = self._columns(schema, files[0])
        table = open_table(files, (image, label), self.cache_dir)
        where = f"{split} of {self.data}"
        self._check_rows(table, split)
        named = class_names(schema).get(label)
        classes = self.classes or _classes(table, label, named, where)
        if self.known and len(classes) != self.known.classes:
            raise DataError(f"{where}: {len(classes)} classes found, {self.known.classes} expected")
        texts = not pa.types.is_integer(table.column(label).type)
        if not self.classes:
            self.label, self.texts = label, texts
        if self.texts and not texts and named is None:
            raise DataError(
                f"{where}: column {label} holds numbers without names, that of the train split "
                f"the texts {some(classes)}: give both the same"
            )
        numbers = _numbers(table.column(label), classes, named, where)
        return Images(table, numbers, classes, where)

    def _files(self, split: str) -> list[Path]:
        if split not in self.splits():
            there = ", ".join(self.splits())
            raise DataError(
                f"task.data {self.data} has no {split} split; it has {there} (expected {LAYOUT})"
            )
        if self.known is None:
            return find_parquet(self.root or Path(), split)
        instead = f"set task.data to a folder that holds {LAYOUT}"
        revision = self.revisions[split] or None
        return hub_files(self.known.repositories[split], self.known.files[split], revision, instead)

    def _columns(self, schema: pa.Schema, path: Path) -> tuple[str, str]:
        if self.known:
            return self.known.image, self.known.label
        images = [
            field.name
            for field in schema
            if pa.types.is_struct(field.type) or "binary" in str(field.type)
        ]
        named = [name for name in LABEL_COLUMNS if name in schema.names]
        labels = named or list(class_names(schema))
        if len(images) != 1 or not labels:
            raise DataError(
                f"{path}: one image column (a struct with bytes, or binary) and a label column "
                "(one of "
                f"{', '.join(LABEL_COLUMNS)}) are needed; it has {', '.join(schema.names)}"
            )
        if self.label and self.label not in schema.names:
            raise DataError(
                f"{path} has no column {self.label}, which the train split's labels are in; it has "
                f"{', '.join(schema.names)}: call them alike"
            )
        return images[0], self.label or labels[0]

    def _check_rows(self, table: Table, split: str) -> None:
        if self.known and len(table) != self.known.rows[split]:
            raise DataError(
                f"the {split} split of {self.known.repositories[split]} has {len(table)} rows, "
                f"{self.known.rows[split]} expected: the repository may hold two generations of "
                "files, or lack some. "
                "Set task.revision to a commit with one whole generation (`train,test` for two "
                "repositories), or task.data "
                f"to a folder that holds {LAYOUT}"
            )


def _folder(data: str, path: Path, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder that holds train*.parquet: the one named, or one inside it as in a clone of a hub
    repository."""
    if data == "generated":
        from tram_ds.data.generated_tables import images_folder

        return images_folder(cache_dir)
    if not path.is_dir():
        raise DataError(
            f"task.data '{data}' is neither 'generated', one of {', '.join(IMAGE_SETS)}, nor a "
            "folder on this machine; "
            f"give a folder that holds {LAYOUT}"
        )
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir())
    found = [
        folder
        for folder in (path, *inside)
        if find_parquet(folder, "train") or find_parquet(folder, "test")
    ]
    if not found:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:40]) or "nothing"
        raise DataError(f"data folder {path} has no images: expected {LAYOUT}, found {there}")
    return found[0]


def _classes(table: Table, label: str, names: list[str] | None, where: str) -> list[str]:
    """Names of the classes: as described, or the sorted texts, or the numbers up to the largest."""
    column = table.column(label)
    if pa.types.is_integer(column.type):
        if names and len(set(names)) < len(names):
            raise DataError(f"{where}: two of its classes have one name, of {some(names)}")
        return names or [str(number) for number in range(max(column.unique().to_pylist()) + 1)]
    if "string" in str(column.type):
        # lexicographic, as the hub numbers them: 1, 10, 100, ...
        texts = sorted(column.unique().to_pylist())
        refuse_alike(texts, f"the classes in {where}")
        return texts
    raise DataError(f"{where}: column {label} holds {column.type}; numbers or texts are needed")


def _numbers(
    column: pa.ChunkedArray, classes: list[str], named: list[str] | None, where: str
) -> np.ndarray:
    """(rows,) int64 class numbers. named: what the file itself calls its numbers; they are mapped
    to `classes` by name, whatever their order."""
    if "string" in str(column.type):
        number = {name: index for index, name in enumerate(classes)}
        if unknown := sorted(set(column.unique().to_pylist()) - set(number)):
            raise DataError(
                f"{where}: label '{unknown[0]}' is not among the {len(classes)} classes of the "
                f"train split: {some(classes)}"
            )
        return np.array([number[name] for name in column.to_pylist()], dtype=np.int64)
    labels = column.to_numpy().astype(np.int64)
    count = len(classes if named is None else named)
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"{where}: row {row} has label {labels[row]}, outside 0 to {count - 1}")
    if named is None or named == classes:
        return labels
    return np.array(_order(named, classes, where), dtype=np.int64)[labels]


def _order(named: list[str], classes: list[str], where: str) -> list[int]:
    """The number in `classes` of each name of `named`."""
    number = {name: index for index, name in enumerate(classes)}
    if len(set(named)) < len(named) or set(named) - set(number):
        raise DataError(
            f"{where}: its classes are called {some(named)}, those of the train split "
            f"{some(classes)}: give both the same names"
        )
    return [number[name] for name in named]

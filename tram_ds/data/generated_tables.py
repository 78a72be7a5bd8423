"""Tiny made-up sentence pairs and images in exactly the local layouts, for smoke runs and tests,
always the same."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tram_ds.data.cache import build_once, cache_root

VERSION = 1  # raise it when the data changes: it is part of the cache key
LANGUAGES = ("en", "sw", "ur")
COLUMNS = ("premise", "hypothesis", "label")
PAIRS = {"train": 96, "validation": 24, "test": 24}
CLASSES = ("blue", "green", "grey", "red")
IMAGES = {"train": 64, "test": 24}
SIZE = 16  # pixels


def pairs_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`<language>/<split>-00000-of-00001.parquet`; only English has a train split."""

    def build(folder: Path) -> None:
        for language in LANGUAGES:
            (folder / language).mkdir(mode=0o700)
            for split, count in PAIRS.items():
                if split != "train" or language == "en":
                    rows = [_pair(language, split, number) for number in range(count)]
                    columns = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
                    labels = {"label": ["entailment", "neutral", "contradiction"]}
                    write(folder / language / f"{split}-00000-of-00001.parquet", columns, labels)

    return _built("pairs", build, cache_dir)


def images_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`{train,test}-00000-of-00001.parquet` with columns image and label."""

    def build(folder: Path) -> None:
        for split, count in IMAGES.items():
            images = [
                {"bytes": _image(split, number), "path": f"{split}{number}.png"}
                for number in range(count)
            ]
            columns = {"image": images, "label": [number % len(CLASSES) for number in range(count)]}
            write(folder / f"{split}-00000-of-00001.parquet", columns, {"label": list(CLASSES)})

    return _built("images", build, cache_dir)


def write(path: Path, columns: dict[str, Any], class_names: dict[str, list[str]]) -> None:
    """A parquet file with the description that Hugging Face data sets keep in theirs."""
    features = {
        name: {"names": names, "_type": "ClassLabel"} for name, names in class_names.items()
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def _built(kind: str, build: Any, cache_dir: str | os.PathLike[str] | None) -> Path:
    path = cache_root(cache_dir) / "generated" / f"{kind}-{VERSION}"
    return build_once(path, build, lambda folder: folder.is_dir())


def _pair(language: str, split: str, number: int) -> tuple[str, str, int]:
    """Entailed: some of the premise's words. Neutral: other words. Contradicted: those words and a
    negation."""
    draws = hashlib.sha256(f"{language}/{split}/{number}".encode()).digest()
    words = [f"{language}{draw % 40}" for draw in draws[:8]]
    label = number % 3
    hypothesis = (
        words[1:4] if label != 1 else [f"{language}{40 + draw % 20}" for draw in draws[8:11]]
    )
    return (
        " ".join(words) + ".",
        " ".join([*(["not"] if label == 2 else []), *hypothesis]) + ".",
        label,
    )


def _image(split: str, number: int) -> bytes:
    """Noise around the colour of the class."""
    bits = hashlib.shake_256(f"{split}/{number}".encode()).digest(SIZE * SIZE * 3)
    pixels = np.frombuffer(bits, dtype=np.uint8).reshape(SIZE, SIZE, 3) // 2
    colour = {"blue": (0, 0, 128), "green": (0, 128, 0), "grey": (64, 64, 64), "red": (128, 0, 0)}
    pixels = pixels + np.array(colour[CLASSES[number % len(CLASSES)]], dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()

"""Tokenisers and image processors as every task builds them.

Remote code is never run. Everything a user can get wrong here is a DataError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from tram_ds.models.config import WAY_OUT
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.hub import waiting
from tram_ds.runtime.paths import refuse_missing
from tram_ds.runtime.wording import first_line


def load_tokenizer(path: str, revision: str | None = None, key: str = "model.path") -> Any:
    """The tokeniser of a folder or hub name, which the recipe gives as `key`. DataError if there is
    none, or one without a vocabulary."""
    refuse_missing(path, key)
    try:
        with waiting(path, key):
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=revision or "main", trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"'{path}' has no usable tokeniser: {first_line(error)}; {WAY_OUT}"
        ) from error
    # transformers' answer to missing vocabulary files
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 3:
        raise DataError(
            f"the tokeniser of '{path}' has {len(tokenizer)} entries: its vocabulary files are "
            "missing"
        )
    return tokenizer


def load_image_processor(path: str, revision: str | None = None) -> Any:
    """The image processor of a folder or hub name, on PIL: torchvision is not needed. DataError if
    there is none."""
    try:
        with waiting(path, "model.path"):
            return AutoImageProcessor.from_pretrained(
                path, revision=revision or "main", backend="pil", trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise DataError(
            f"'{path}' has no usable preprocessor_config.json: {first_line(error)}; {WAY_OUT}"
        ) from error


def new_image_processor(side: int) -> Any:
    """For a fresh model: resized to `side` x `side` pixels, each channel normalised from [0, 1] to
    [-1, 1]."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=half, image_std=half
    )


def has_tokenizer(path: str | None) -> bool:
    """Whether a model path brings a tokeniser: a local folder must hold its files, a hub name is
    assumed to."""
    if path is None:
        return False
    folder = Path(path)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    names += ("sentencepiece.bpe.model", "tokenizer.model", "spm.model", "spiece.model")
    return not folder.is_dir() or any((folder / name).is_file() for name in names)

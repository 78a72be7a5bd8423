"""Weights of a local model that are not whole: refused by name, with the file that is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tram_ds.models.pretrained import load_model
from tram_ds.models.whole import INDEX
from tram_ds.recipe.model_section import ModelSection
from tram_ds.runtime.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards and their index."""
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=500)
    GPT2LMHeadModel(config).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*-of-00005.safetensors"))) == 5
    return tmp_path


def load(folder: Path) -> object:
    return load_model(AutoModelForCausalLM, ModelSection(path=str(folder)))


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05d}-of-00005.safetensors"


def edit(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def forget(folder: Path) -> None:
    """The shard and all that the index says of it."""
    shard(folder, 2).unlink()
    edit(
        folder,
        lambda placed: [placed.pop(t) for t, f in [*placed.items()] if f == shard(folder, 2).name],
    )


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard": (lambda d: shard(d, 2).unlink(), "lacks model-00002-of-00005.safetensors of 5"),
    "a shard and the index's word of it": (forget, "lacks model-00002-of-00005.safetensors of 5"),
    "the index": (lambda d: (d / INDEX).unlink(), f"lacks {INDEX}, which says what model-00001"),
    "the end of a shard": (
        lambda d: shard(d, 3).write_bytes(shard(d, 3).read_bytes()[:-100]),
        "model-00003-of-00005.safetensors is cut",
    ),
    "all of a shard": (lambda d: shard(d, 1).write_bytes(b""), "00001-of-00005.safetensors is cut"),
    "what git-lfs holds": (lambda d: shard(d, 4).write_text(POINTER), "run `git lfs pull`"),
    "a shard's own tensors": (
        lambda d: shard(d, 5).write_bytes(shard(d, 4).read_bytes()),
        "model-00005-of-00005.safetensors lacks transformer.",
    ),
    "half an index": (lambda d: (d / INDEX).write_text("{"), f"{INDEX} is damaged"),
    "an index's map": (lambda d: (d / INDEX).write_text("{}"), f"{INDEX} is damaged"),
    "a link that leads nowhere": (
        lambda d: (shard(d, 2).unlink(), shard(d, 2).symlink_to("gone")),
        "lacks model-00002-of-00005.safetensors",
    ),
    "its own folder": (
        lambda d: edit(d, lambda placed: placed.update({"x": "../model.safetensors"})),
        "names '../model.safetensors'",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_weights_that_are_not_whole_are_refused(folder: Path, what: str) -> None:
    change, said = BREAKS[what]
    change(folder)
    with pytest.raises(DataError, match=re.escape(said)):
        load(folder)


def test_whole_weights_load(folder: Path) -> None:
    """Also where an index of an older, larger export is left beside the one file."""
    assert load(folder)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=500)
    GPT2LMHeadModel(config).save_pretrained(folder / "one")
    assert load(folder / "one")
    (folder / "one" / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"model\.safetensors is cut"):
        load(folder / "one")

"""Weights that are there as a pickle alone: looked into and refused by name where they are not
whole, and never run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.recipe.model_section import ModelSection
from tram_ds.runtime.errors import DataError

TINY = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
ONE, PARTS = "pytorch_model.bin", "pytorch_model-{:05d}-of-00002.bin"


class Runs:
    """A pickle that makes a folder of its name when it is read."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


@pytest.fixture(scope="module")
def model() -> Any:
    config = AutoConfig.for_model("gpt2", **TINY, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.config.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, whole: bool) -> Any:
    section, cache = ModelSection(path=str(folder)), str(folder / "cache")
    return (load_model if whole else load_stored)(AutoModelForCausalLM, section, cache_dir=cache)


def in_parts(folder: Path, state: dict[str, Any]) -> None:
    names = list(state)
    half, where = len(names) // 2, {}
    for number, mine in enumerate((names[:half], names[half:]), start=1):
        torch.save({name: state[name] for name in mine}, folder / PARTS.format(number))
        where |= dict.fromkeys(mine, PARTS.format(number))
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{ONE}.index.json").write_text(json.dumps(index))


def cut(folder: Path, state: dict[str, Any]) -> None:
    torch.save(state, folder / ONE)
    os.truncate(folder / ONE, (folder / ONE).stat().st_size // 2)


def overwritten(folder: Path, state: dict[str, Any]) -> None:
    (folder / ONE).write_bytes(b"nonsense" * 100)


def pointer(folder: Path, state: dict[str, Any]) -> None:
    (folder / ONE).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")


def runs(folder: Path, state: dict[str, Any]) -> None:
    torch.save({**state, "more": Runs(folder / "made")}, folder / ONE)


def runs_as_before_archives(folder: Path, state: dict[str, Any]) -> None:
    (folder / ONE).write_bytes(pickle.dumps(Runs(folder / "made"), 2))


def runs_in_a_part(folder: Path, state: dict[str, Any]) -> None:
    in_parts(folder, state)
    torch.save({"more": Runs(folder / "made")}, folder / PARTS.format(2))


def of_training(folder: Path, state: dict[str, Any]) -> None:
    torch.save({"model": state, "step": 3}, folder / ONE)


def lacks_a_part(folder: Path, state: dict[str, Any]) -> None:
    in_parts(folder, state)
    (folder / PARTS.format(2)).unlink()


def climbs_out(folder: Path, state: dict[str, Any]) -> None:
    (folder / f"{ONE}.index.json").write_text('{"weight_map": {"a": "../a.bin"}}')


def index_cut(folder: Path, state: dict[str, Any]) -> None:
    (folder / f"{ONE}.index.json").write_text("{")


def nothing(folder: Path, state: dict[str, Any]) -> None:
    pass


Wrong = Callable[[Path, dict[str, Any]], None]


@pytest.mark.parametrize("whole", [False, True], ids=["stored", "whole"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (cut, f"{ONE} is cut or damaged .*get it again"),
        (overwritten, f"{ONE} is damaged, or would run code .*get it again, as safetensors"),
        (pointer, f"{ONE} is a pointer of git-lfs: run `git lfs pull`"),
        (runs, f"{ONE} is damaged, or would run code .*mkdir.*as safetensors"),
        (runs_as_before_archives, f"{ONE} is damaged, or would run code "),
        (runs_in_a_part, r"00002-of-00002.bin is damaged, or would run code .*mkdir"),
        (of_training, f"{ONE} holds more than a model's weights .*save_pretrained"),
        (lacks_a_part, "lacks pytorch_model-00002-of-00002.bin, which .* names: get the whole"),
        (climbs_out, r"lacks \.\./a.bin, which"),
        (index_cut, "pytorch_model.bin.index.json is damaged"),
        (nothing, r"has no weights that are read .*save_pretrained of transformers"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_is_refused_by_name_and_never_run(
    folder: Path, model: Any, wrong: Wrong, said: str, whole: bool
) -> None:
    wrong(folder, model.state_dict())
    with pytest.raises(DataError, match=said) as refused:
        load(folder, whole)
    assert "weights_only" not in str(refused.value) and "\n" not in str(refused.value)
    assert not (folder / "made").exists()
    assert not [p for p in folder.glob("cache/models/*") if p.is_dir()]

"""One thread per process for every test: two ranks on two cores, and tiny tensors that threads only
slow down."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.made_recipes import MINIMAL
from tram_ds.recipe.recipe import Recipe, RecipeError, load

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def recipe_of(tmp_path, monkeypatch):
    """(text, *overrides) -> Recipe, from a file called mine.yaml in the working folder."""
    monkeypatch.chdir(tmp_path)

    def build(text: str = MINIMAL, *overrides: str) -> Recipe:
        Path("mine.yaml").write_text(text, encoding="utf-8")
        return load("mine.yaml", list(overrides))

    return build


@pytest.fixture
def refusal(recipe_of):
    """(text, *overrides) -> the lines of the RecipeError."""

    def build(text: str = MINIMAL, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            recipe_of(text, *overrides)
        return str(caught.value).split("\n")

    return build

"""What a run may go on with: its own recipe, also where an earlier version of the library wrote
it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.made_recipes import MINIMAL, SHIPPED
from tram_ds.checkpoint import changes
from tram_ds.checkpoint.changes import changed
from tram_ds.recipe.loading import load


def leaves(tree: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        name = f"{path}{key}"
        found += leaves(value, f"{name}.") if isinstance(value, dict) and value else [name]
    return found


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy that lacks a dotted key."""
    tree = copy.deepcopy(tree)
    section, _, name = key.rpartition(".")
    del (value_of(tree, section) if section else tree)[name]
    return tree


def value_of(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_key_that_an_earlier_version_lacks_is_what_that_version_did(path) -> None:
    """Each key of each recipe in turn: missing then, it is no difference where it has its default
    now, and one by its name where it has not."""
    now = load(str(path)).model_dump(mode="json")
    for key in leaves(now):
        if changes.free(key) or key.startswith("model.init."):
            continue
        found = changed(without(now, key), now)
        if key == "algorithm.radius":  # the next test's
            continue
        formerly = changes.FORMERLY.get(key, changes.default_of(key))
        same = value_of(now, key) == json.loads(json.dumps(formerly))
        assert [line.split(":")[0] for line in found] == ([] if same else [key])


def test_what_early_stopping_goes_by_is_free_without_it_alone(recipe_of) -> None:
    def of(*words: str) -> dict[str, Any]:
        return recipe_of(MINIMAL, *words).model_dump(mode="json")

    assert changed(of("eval.every_steps=2"), of("eval.every_steps=3")) == []
    stopping = "train.early_stopping={patience: 1}"
    found = changed(of("eval.every_steps=2", stopping), of("eval.every_steps=3", stopping))
    assert found == ["eval.every_steps: 2 -> 3"]


def test_what_a_default_does_differently_now_is_a_difference(recipe_of) -> None:
    """Blocks began without BOS, and the TRAM rows' radius had no bound."""
    now = recipe_of(MINIMAL, "algorithm=tram_prev").model_dump(mode="json")
    then = without(without(now, "algorithm.radius"), "task.bos")
    assert changed(then, now) == [
        "algorithm.radius_max: 'none' -> None",
        "task.bos: 'none' -> 'auto'",
    ]
    now["algorithm"]["radius_max"] = then["algorithm"]["radius_max"] = 0.3
    now["task"]["bos"] = "none"
    assert changed(then, now) == []
    sam = recipe_of(MINIMAL, "algorithm=sam").model_dump(mode="json")
    assert changed(without(sam, "algorithm.radius"), sam) == []  # sam has no such radius

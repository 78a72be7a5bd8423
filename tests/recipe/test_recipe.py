"""Recipes: what is shipped, how overrides and values are read."""

from __future__ import annotations

import importlib
import json
import re

import pytest
import yaml

from tests.made_recipes import MINIMAL, SHIPPED, section_models
from tram_ds.algorithms.bound import bind
from tram_ds.algorithms.table import ALGORITHMS, AlgorithmSection
from tram_ds.recipe import docs as recipe_docs
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import dump
from tram_ds.recipe.task_section import task_names

ROOT = recipe_file.ROOT


# What is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_is_short_and_says_how_to_launch_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(
        rf"# (deepspeed|torchrun|srun|python) .*launch/train.py --recipe {path.name}", lines[0]
    )
    assert lines[1] == "# yaml-language-server: $schema=recipe.schema.json"
    assert len(lines) <= 40
    recipe = load(path.name)
    assert recipe == load(path.stem) == load(str(path))
    assert recipe.name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_says_only_what_differs_from_the_defaults(path):
    data = yaml.load(path.read_text(encoding="utf-8"), recipe_file._Loader)
    defaults = {
        f"{name}.{key}": field.default
        for name, model in section_models().items()
        for key, field in model.model_fields.items()
    }
    repeated = [
        f"{name}.{key}"
        for name, section in data.items()
        for key, value in (section.items() if isinstance(section, dict) else [])
        if key != "name" and defaults[f"{name}.{key}"] == value
    ]
    assert repeated == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_dumping_and_loading_gives_the_same_recipe(path, tmp_path):
    recipe = load(path.name, ["train.seed=7"])
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump(recipe), encoding="utf-8")
    assert load(str(copy)) == recipe
    assert load(str(copy)).name == path.stem, "the run folder's recipe.yaml keeps its name"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_survives_dumping(name, recipe_of, tmp_path):
    recipe = recipe_of(MINIMAL, f"algorithm={name}")
    (tmp_path / "again.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(str(tmp_path / "again.yaml")).algorithm == recipe.algorithm
    assert bind(recipe.algorithm).name == name


@pytest.mark.parametrize(
    "text", ["no", "1e-5", "null", "0x1F", "2026-01-01", "~", "a: b", "{x}", "010", ".5", "[a"]
)
def test_text_that_looks_like_something_else_survives_dumping(text, recipe_of, tmp_path):
    recipe = recipe_of(MINIMAL, f"tracking.experiment={json.dumps(text)}")
    assert recipe.tracking.experiment == text
    (tmp_path / "again.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(str(tmp_path / "again.yaml")) == recipe.model_copy(update={"name": "mine"})


def test_readme_and_schema_are_in_step_with_the_models():
    for name, text in recipe_docs.files().items():
        assert (ROOT / "recipes" / name).read_text(encoding="utf-8") == text, (
            "run python -m tram_ds.recipe.docs"
        )


def test_every_key_is_documented_once():
    text = recipe_docs.reference_markdown()
    for name, model in section_models().items():
        table = text.split(f"\n## {name or 'Top level'}\n")[1].split("\n## ")[0]
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key} has no docstring"
            if key not in section_models():
                assert table.count(f"\n| `{key}` |") == 1


def test_schema_accepts_shipped_recipes_and_refuses_unknown_keys():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(recipe_docs.schema())
    for path in SHIPPED:
        data = yaml.load(path.read_text(encoding="utf-8"), recipe_file._Loader)
        validator.validate(data)
        assert not validator.is_valid(data | {"seeds": 1})
        assert not validator.is_valid(data | {"train": data["train"] | {"sed": 1}})
        assert not validator.is_valid(data | {"algorithm": "tramp"})


# Overrides and values


def test_a_string_is_the_name_of_its_section(recipe_of):
    assert recipe_of(MINIMAL).algorithm == AlgorithmSection(name="sam")
    assert recipe_of(MINIMAL, "schedule=cosine").schedule.name == "cosine"


def test_overrides_replace_a_section_or_one_key(recipe_of):
    text = MINIMAL.replace("algorithm: sam", "algorithm: {name: tram_x, sigma: 0.2}")
    assert recipe_of(text).algorithm.sigma == 0.2
    assert recipe_of(text, "algorithm=asam").algorithm == AlgorithmSection(name="asam")
    assert recipe_of(text, "algorithm.name=r3f").algorithm == AlgorithmSection(
        name="r3f", sigma=0.2
    )
    assert recipe_of(MINIMAL, "algorithm.rho=0.1").algorithm == AlgorithmSection(
        name="sam", rho=0.1
    )
    assert recipe_of(MINIMAL, "train.seed=1", "train.seed=2").train.seed == 2
    assert recipe_of(MINIMAL, "eval={every_steps: 5}").eval.every_steps == 5


def test_override_values_are_yaml(recipe_of):
    recipe = recipe_of(
        MINIMAL, "task.eval=[Art, no]", "train.clip_norm=null", "optimizer.lr=2e-5", "task.data=a=b"
    )
    assert recipe.task.eval == ["Art", "no"], "yes and no are text"
    assert recipe.train.clip_norm is None
    assert recipe.optimizer.lr == 2e-5
    assert recipe.task.data == "a=b"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "1.e-5", "0.00001", ".00001", "+1e-5"])
def test_exponents_are_numbers(text, recipe_of):
    assert recipe_of(MINIMAL.replace("1e-5", text)).optimizer.lr == pytest.approx(1e-5, rel=1e-15)


def test_numbers_are_decimal(recipe_of):
    assert recipe_of(MINIMAL, "train.seed=010").train.seed == 10, "YAML 1.1 would read 8"


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=yes",
        "train.seed='3'",
        "train.seed=1.5",
        "train.seed=true",
        "train.seed=1:30",
        "train.seed=1_0",
        "train.self_check=no",
        "train.self_check=1",
        "train.self_check='true'",
        "optimizer.lr='1'",
        "optimizer.lr=true",
        "optimizer.lr=.nan",
        "optimizer.lr=.inf",
        "optimizer.lr=1e400",
        "optimizer.lr=-1e-5",
        "optimizer.betas=[0.9, 1.0]",
        "optimizer.betas=[0.9]",
        "task.data=3",
        "task.data=null",
        "task.eval=Art",
        "task.eval=[1]",
        "model.dropout=1",
        "train.steps=0",
        "train.steps=1e3",
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(override, refusal):
    key = override.partition("=")[0]
    (line,) = refusal(MINIMAL, override)
    assert line.startswith(f"command line: {key}"), line


def test_compile_is_off_unless_asked_for_and_goes_with_every_engine_but_zero3(recipe_of):
    assert recipe_of().model.compile is False
    for engine in ("auto", "replicated", "fsdp2", "zero", "{name: zero, config: zero1.json}"):
        assert recipe_of(MINIMAL, "model.compile=true", f"engine={engine}").model.compile is True


def test_a_task_is_a_module_that_builds_one() -> None:
    """What else lies beside the tasks is no name for one."""
    found = {name: importlib.import_module(f"tram_ds.tasks.{name}") for name in task_names()}
    assert list(found) == ["entailment", "image_classification", "instruction", "language_modeling"]
    assert all(callable(module.build) for module in found.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_says_what_is_known_of_whether_its_row_acts(path) -> None:
    """Beside the row or above it, with the page that has the measurements."""
    row = load(path.stem).algorithm.name
    said = [line for line in path.read_text().splitlines() if "docs/choosing.md" in line]
    assert row == "base" or said

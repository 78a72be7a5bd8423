"""Recipes: what is refused, and what the refusal says."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from tests.made_recipes import MINIMAL, section_models
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.table import ALGORITHMS, OPTIONS, AlgorithmSection, readers
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe, RecipeError, check_length
from tram_ds.runtime.checked import Section

# What errors say


def test_an_error_names_file_line_key_value_and_what_is_allowed(refusal):
    (line,) = refusal(
        MINIMAL.replace("algorithm: sam", "algorithm: {name: tram_x, distance: kl_foward}")
    )
    assert line == (
        "mine.yaml:3: algorithm.distance = 'kl_foward': expected one of kl_forward, kl_reverse, "
        "kl_symmetric, mmd, l2, "
        "renyi; did you mean 'kl_forward'?"
    )


def test_a_key_of_another_section_is_sent_there(refusal):
    (line,) = refusal(MINIMAL, "algorithm.seed=3")
    assert line == (
        "command line: algorithm.seed = 3: unknown key 'seed' in section 'algorithm'; did you "
        "mean train.seed?"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.sed=3", "did you mean 'seed'?"),
        ("trian.seed=3", "did you mean 'train'?"),
        ("lr=3", "did you mean optimizer.lr?"),
        ("train.warm_up_steps=3", "did you mean 'schedule.warmup_steps'?"),
        ("engine.every_steps=3", "did you mean eval.every_steps or checkpoint.every_steps?"),
        ("schedule.xyzzy=3", "(it has name, warmup_steps, power, end_lr)"),
        ("algorithm=tram_perv", "did you mean 'tram_prev'?"),
        ("task.name=language_modelling", "did you mean 'language_modeling'?"),
        ("engine=zeroo", "did you mean 'zero'?"),
        ("optimizer.name=adamW", "did you mean 'adamw'?"),
        ("schedule=polynomal", "did you mean 'polynomial'?"),
        ("engine={name: zero, config: zero4.json}", "did you mean 'zero3.json'?"),
        ("engine={name: fsdp2, config: shards.yaml}", "did you mean 'shard.yaml'?"),
    ],
)
def test_did_you_mean(override, expected, refusal):
    (line,) = refusal(MINIMAL, override)
    assert expected in line


def test_several_errors_are_one_line_each(refusal):
    lines = refusal(MINIMAL, "train.sed=1", "optimizer.lr=fast", "engine=zeroo")
    assert len(lines) == 3
    assert {line.split(": ")[1].split(" = ")[0] for line in lines} == {
        "train.sed",
        "optimizer.lr",
        "engine.name",
    }


def test_long_and_multi_line_values_stay_on_one_line(refusal):
    (line,) = refusal(MINIMAL, "train.seed=" + json.dumps("a\n" * 500))
    assert len(line) < 200


def test_missing_keys_are_named(refusal):
    lines = refusal(
        "task: {name: language_modeling}\ntrain: {steps: 1, global_batch: 1, micro_batch: 1}\n"
    )
    assert [line.split(": ")[1] for line in lines] == [
        "task.data",
        "model",
        "algorithm",
        "optimizer",
    ]


def test_an_unknown_recipe_is_looked_up(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load("quikstart")


@pytest.mark.parametrize("name", section_models())
def test_an_unknown_key_is_refused_at_every_level(name, refusal):
    path = f"{name}.surely_not_a_key".lstrip(".")
    lines = refusal(MINIMAL, f"{path}=1")
    assert any(line.startswith(f"command line: {path} = 1: unknown key") for line in lines)


def test_every_model_of_the_tree_is_strict_and_frozen():
    seen, todo = set(), [Recipe]
    while todo:
        model = todo.pop()
        seen.add(model)
        config = model.model_config
        assert (
            config["extra"] == "forbid"
            and config["frozen"]
            and config["strict"]
            and not config["allow_inf_nan"]
        )
        inner = [field.annotation for field in model.model_fields.values()]
        todo += [
            m for m in inner if inspect.isclass(m) and issubclass(m, BaseModel) and m not in seen
        ]
        assert "BaseModel" not in str(inner), "a model inside a container would be missed here"
    assert seen == set(section_models().values()) and all(
        issubclass(model, Section) for model in seen
    )
    with pytest.raises(ValidationError, match="frozen"):
        load("quickstart").train.seed = 1


# YAML


def test_duplicate_keys_are_refused_with_both_lines(refusal):
    (line,) = refusal(MINIMAL + "algorithm: asam\n")
    assert line == "mine.yaml:6: duplicate key 'algorithm', first on line 3"
    (line,) = refusal(MINIMAL.replace("{lr: 1e-5}", "{lr: 1e-5, lr: 1e-4}"))
    assert line == "mine.yaml:4: duplicate key 'lr', first on line 4"


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/name:os.system",
        "!!python/object/new:os.system ['touch ran']",
        "!!binary aGk=",
        "!custom x",
    ],
)
def test_tags_are_inert(value, refusal):
    lines = refusal(MINIMAL + f"run_dir: {value}\n")
    assert (
        len(lines) == 1 and lines[0].startswith("mine.yaml:6: tag !") and "not allowed" in lines[0]
    )
    assert len(refusal(MINIMAL, f"run_dir={value}")) == 1
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected sections"),
        ("- a\n- b\n", "expected sections"),
        ("task: {name: x\n", "not valid YAML"),
        ("task: &a {x: 1}\nmodel: *a\n", "anchors and aliases"),
        ("a: &a [*a]\n", "anchors and aliases"),
        ("1: 2\n", "is not text"),
        ("? [a]\n: 2\n", "is not text"),
        ("a: \x07\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(text, expected, refusal):
    (line,) = refusal(text)
    assert line.startswith("mine.yaml") and expected in line


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("override", ["foo", "=3", ".seed=3", "train.=3", "train.steps.x=1"])
def test_a_malformed_override_is_refused(override, refusal):
    (line,) = refusal(MINIMAL, override)
    assert line.startswith("command line: ")


# Values that do not go together


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_option_its_row_does_not_read_is_refused_naming_both_keys(name, refusal):
    values = {
        "rho": 0.1,
        "fisher": "alg2",
        "sigma": 0.3,
        "weight": 0.2,
        "decay": 0.9,
        "radius_scale": 2.0,
    }
    for key, value in values.items():
        if name not in readers(key):
            (line,) = refusal(MINIMAL, f"algorithm={{name: {name}, {key}: {value}}}")
            assert (
                f"algorithm.{key} = {value!r}" in line
                and f"algorithm.name = {name} does not read" in line
            )


def test_what_a_row_reads_agrees_with_what_it_is_bound_to():
    """What climbs reads rho, a region's distance is scaled, a penalty has a weight."""
    rows = {name: algorithm(name) for name in ALGORITHMS}
    climbs = {name for name, row in rows.items() if row.ascent}
    from_region = {name for name, row in rows.items() if isinstance(row.radius, TrustRegion)}
    penalised = {name for name, row in rows.items() if row.penalty}
    read = {key: set(readers(key)) for key in OPTIONS}
    assert read["rho"] == climbs | {"msam"}
    assert read["radius_scale"] == from_region
    assert read["weight"] == penalised
    assert read["distance"] == from_region | penalised
    assert read["penalty_passes"] == penalised & climbs
    assert read["pass2_dropout"] == climbs - {"functional_sam"}  # which repeats pass 1's masks
    assert read["fisher"] == {name for name, row in rows.items() if row.noised}
    assert set(AlgorithmSection.model_fields) == {"name", *OPTIONS}


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["algorithm={name: tram_x, distance: mmd}"], ["algorithm.distance", "task.name"]),
        (
            ["algorithm={name: tram_x, mmd_kernel: rbf}"],
            ["algorithm.mmd_kernel", "algorithm.distance"],
        ),
        (
            ["algorithm={name: tram_x, renyi_order: 2.0}"],
            ["algorithm.renyi_order", "algorithm.distance"],
        ),
        (
            ["algorithm={name: tram_x, samsung_eta: 0.1}"],
            ["algorithm.samsung_eta", "algorithm.adaptive_filter"],
        ),
        (
            ["algorithm={name: tram_x, radius_min: 2.0, radius_max: 1.0}"],
            ["algorithm.radius_min", "radius_max"],
        ),
        (
            ["algorithm={name: tram_x, student_mode: eval, reference_mode: paired}"],
            ["algorithm.reference_mode", "student_mode"],
        ),
        (
            ["algorithm={name: tram_x, distance: renyi, renyi_order: 1.0}"],
            ["algorithm.renyi_order", "kl_forward"],
        ),
        (["algorithm={name: mesa, penalty_start: 10}"], ["algorithm.penalty_start", "train.steps"]),
        (["train.epochs=2"], ["train.steps", "train.epochs"]),
        (["train.steps=null"], ["train.steps", "train.epochs"]),
        (["model.path=gpt2"], ["model.path", "model.init"]),
        (["model.init=null"], ["model.path", "model.init"]),
        (["model.attention=flash_attention_2"], ["model.attention", "model.dtype"]),
        (["model.revision=main"], ["model.revision", "model.path"]),
        (["optimizer.momentum=0.9"], ["optimizer.momentum", "optimizer.name"]),
        (["optimizer={name: sgd, lr: 1.0, eps: 1e-6}"], ["optimizer.eps", "optimizer.name"]),
        (["schedule={name: linear, power: 2.0}"], ["schedule.power", "schedule.name"]),
        (["schedule={name: linear, end_lr: 1.0}"], ["schedule.end_lr", "optimizer.lr"]),
        (
            ["algorithm=msam", "optimizer={name: sgd, lr: 1}"],
            ["algorithm.name", "optimizer.momentum"],
        ),
        (
            ["algorithm={name: sam, precondition: true}", "optimizer={name: sgd, lr: 1}"],
            ["algorithm.precondition", "optimizer.name"],
        ),
        (["algorithm={name: l2sp, pull: 1.0e+9}"], ["algorithm.pull", "optimizer.lr"]),
        (["schedule={name: linear, warmup_steps: 11}"], ["schedule.warmup_steps", "train.steps"]),
        (["eval.select=best"], ["eval.select", "eval.every_steps"]),
        (["algorithm=trpo", "eval.weights=ema"], ["eval.weights", "algorithm.name", "mesa"]),
        (["eval={select: best, every_steps: 11}"], ["eval.every_steps", "eval.select", "10"]),
        (
            ["task={name: entailment, data: generated}", "eval.generate={prompts: [a]}"],
            ["eval.generate", "task.name"],
        ),
        (["eval.domains=all"], ["eval.domains", "eval.every_steps"]),
        (
            ["eval={every_steps: 2, select: best, key: validation/fr/loss}"],
            ["eval.key", "eval.domains"],
        ),
        (
            ["eval={every_steps: 2, domains: all, key: validation/fr/loss}"],
            ["eval.key", "eval.select", "train.early_stopping"],
        ),
        (["train.early_stopping={patience: 2}"], ["train.early_stopping", "eval.every_steps"]),
        (
            # the first validation run, at step 5, is the best so far; the second is at the end
            ["train.early_stopping={patience: 1}", "eval.every_steps=5"],
            ["train.early_stopping.patience", "step 10", "eval.every_steps"],
        ),
        (["engine.config=zero2.json"], ["engine.config", "engine.name"]),
        (
            ["model.compile=true", "engine={name: zero, config: zero3.json}"],
            ["model.compile", "ZeRO-3", "engine=fsdp2"],
        ),
        (["engine={name: zero, config: shard.yaml}"], ["engine.config", "engine.name"]),
        (["task.train=Art", "task.exclude=[Art]"], ["task.exclude", "task.train"]),
        (["task={name: image_classification, data: x, seq_len: 8}"], ["task.seq_len", "task.name"]),
    ],
)
def test_contradictions_name_both_keys(overrides, keys, refusal):
    text = "\n".join(refusal(MINIMAL, *overrides))
    assert all(key in text for key in keys), text


@pytest.mark.parametrize(
    "override, key",
    [
        ("schedule={name: linear, warmup_steps: 5}", "schedule.warmup_steps"),
        ("algorithm={name: mesa, penalty_start: 4}", "algorithm.penalty_start"),
        ("eval={select: best, every_steps: 5}", "eval.every_steps"),
    ],
)
def test_epochs_are_held_against_the_same_lengths(override, key, recipe_of):
    recipe = recipe_of(MINIMAL, "train.steps=null", "train.epochs=2", override)
    with pytest.raises(RecipeError, match=f"{key}: .*train.epochs = 2 is 4 steps"):
        check_length(recipe, 4)
    check_length(recipe, 5)


@pytest.mark.parametrize("place", ["model.", "task.", "", "model.init."])
@pytest.mark.parametrize("value", ["true", "false"])
def test_remote_code_cannot_be_turned_on(place, value, refusal):
    (line,) = refusal(MINIMAL, f"{place}trust_remote_code={value}")
    assert "cannot be turned on" in line


def test_credentials_in_the_tracking_uri_are_refused_and_not_repeated(refusal):
    (line,) = refusal(MINIMAL, "tracking.uri=https://me:canary@host:5000/x")
    assert "MLFLOW_TRACKING_PASSWORD" in line and "canary" not in line

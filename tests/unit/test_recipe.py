"""Recipes: what loads, what is refused, and what the refusal says."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from tram_ds import recipe_docs, recipe_file, recipe_model, recipe_sections
from tram_ds.algorithm import ALGORITHMS, Options
from tram_ds.algorithm import algorithm as bind
from tram_ds.engine_config import engine_config
from tram_ds.recipe import Recipe, RecipeError, accumulation, dump, load, smoke
from tram_ds.recipe_algorithm import KNOWN, READ_BY, AlgorithmSection
from tram_ds.recipe_sections import EngineSection, Section

ROOT = recipe_file.ROOT
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = """\
task: {name: language_modeling, data: installed_docs}
model: {init: {architecture: gpt2}}
algorithm: sam
optimizer: {lr: 1e-5}
train: {steps: 10, global_batch: 8, micro_batch: 2}
"""


@pytest.fixture(autouse=True)
def designed_tasks(monkeypatch):
    """The three tasks of the design have a name even before each has its module."""
    names = {"language_modeling", "entailment", "image_classification", *recipe_sections.task_names()}
    monkeypatch.setattr(recipe_sections, "task_names", lambda: sorted(names))


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


def section_models() -> dict[str, type[BaseModel]]:
    fields = {"": Recipe} | {key: field.annotation for key, field in Recipe.model_fields.items()}
    return {k: m for k, m in fields.items() if isinstance(m, type) and issubclass(m, BaseModel)}


# What is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_is_short_and_says_how_to_launch_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(rf"# (deepspeed|torchrun|srun|python) .*launch/train.py --recipe {path.name}", lines[0])
    assert lines[1] == "# yaml-language-server: $schema=recipe.schema.json"
    assert len(lines) <= 40
    recipe = load(path.name)
    assert recipe == load(path.stem) == load(str(path))
    assert recipe.name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_says_only_what_differs_from_the_defaults(path):
    data = yaml.load(path.read_text(encoding="utf-8"), recipe_file._Loader)
    defaults = {
        f"{name}.{key}": field.default for name, model in section_models().items() for key, field in model.model_fields.items()
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
    bind(name, **recipe.algorithm.options())


@pytest.mark.parametrize("text", ["no", "1e-5", "null", "0x1F", "2026-01-01", "~", "a: b", "{x}", "010", ".5", "[a"])
def test_text_that_looks_like_something_else_survives_dumping(text, recipe_of, tmp_path):
    recipe = recipe_of(MINIMAL, f"tracking.experiment={json.dumps(text)}")
    assert recipe.tracking.experiment == text
    (tmp_path / "again.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(str(tmp_path / "again.yaml")) == recipe.model_copy(update={"name": "mine"})


def test_readme_and_schema_are_in_step_with_the_models():
    for name, text in recipe_docs.files().items():
        assert (ROOT / "recipes" / name).read_text(encoding="utf-8") == text, "run python -m tram_ds.recipe_docs"


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
    assert recipe_of(text, "algorithm.name=r3f").algorithm == AlgorithmSection(name="r3f", sigma=0.2)
    assert recipe_of(MINIMAL, "algorithm.rho=0.1").algorithm == AlgorithmSection(name="sam", rho=0.1)
    assert recipe_of(MINIMAL, "train.seed=1", "train.seed=2").train.seed == 2
    assert recipe_of(MINIMAL, "eval={every_steps: 5}").eval.every_steps == 5


def test_override_values_are_yaml(recipe_of):
    recipe = recipe_of(MINIMAL, "task.eval=[Art, no]", "train.clip_norm=null", "optimizer.lr=2e-5", "task.data=a=b")
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


# What errors say


def test_an_error_names_file_line_key_value_and_what_is_allowed(refusal):
    (line,) = refusal(MINIMAL.replace("algorithm: sam", "algorithm: {name: tram_x, distance: kl_foward}"))
    assert line == (
        "mine.yaml:3: algorithm.distance = 'kl_foward': expected one of kl_forward, kl_reverse, kl_symmetric, mmd, l2, "
        "renyi; did you mean 'kl_forward'?"
    )


def test_a_key_of_another_section_is_sent_there(refusal):
    (line,) = refusal(MINIMAL, "algorithm.seed=3")
    assert line == ("command line: algorithm.seed = 3: unknown key 'seed' in section 'algorithm'; did you mean train.seed?")


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
    assert {line.split(": ")[1].split(" = ")[0] for line in lines} == {"train.sed", "optimizer.lr", "engine.name"}


def test_long_and_multi_line_values_stay_on_one_line(refusal):
    (line,) = refusal(MINIMAL, "train.seed=" + json.dumps("a\n" * 500))
    assert len(line) < 200


def test_missing_keys_are_named(refusal):
    lines = refusal("task: {name: language_modeling}\ntrain: {steps: 1, global_batch: 1, micro_batch: 1}\n")
    assert [line.split(": ")[1] for line in lines] == ["task.data", "model", "algorithm", "optimizer"]


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
        assert config["extra"] == "forbid" and config["frozen"] and config["strict"] and not config["allow_inf_nan"]
        inner = [field.annotation for field in model.model_fields.values()]
        todo += [m for m in inner if inspect.isclass(m) and issubclass(m, BaseModel) and m not in seen]
        assert "BaseModel" not in str(inner), "a model inside a container would be missed here"
    assert seen == set(section_models().values()) and all(issubclass(model, Section) for model in seen)
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
    assert len(lines) == 1 and lines[0].startswith("mine.yaml:6: tag !") and "not allowed" in lines[0]
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
    values = {"rho": 0.1, "fisher": "alg2", "sigma": 0.3, "weight": 0.2, "decay": 0.9, "radius_scale": 2.0}
    for key, value in values.items():
        if name not in READ_BY[key]:
            (line,) = refusal(MINIMAL, f"algorithm={{name: {name}, {key}: {value}}}")
            assert f"algorithm.{key} = {value!r}" in line and f"algorithm.name = {name} does not read" in line


def test_the_table_of_options_agrees_with_the_rows():
    """Derived from the rows: a constant radius reads rho, a region's distance is scaled, a penalty has a weight."""
    climbs = {name for name, row in ALGORITHMS.items() if row.ascent}
    from_region = {name for name, row in ALGORITHMS.items() if callable(row.radius)}
    penalised = {name for name, row in ALGORITHMS.items() if row.penalty}
    assert set(ALGORITHMS) == KNOWN
    assert READ_BY["rho"] == climbs - from_region
    assert READ_BY["radius_scale"] == from_region
    assert READ_BY["weight"] == penalised
    assert READ_BY["distance"] == from_region | penalised
    assert READ_BY["penalty_passes"] == penalised & climbs
    assert READ_BY["pass2_dropout"] == climbs
    noised = {name for name, row in ALGORITHMS.items() if row.noised}
    assert READ_BY["fisher"] == noised


def test_options_are_those_of_the_algorithm_table_with_the_same_defaults():
    table = vars(Options())
    section = {key: field.default for key, field in AlgorithmSection.model_fields.items() if key != "name"}
    assert section == table
    assert set(section) == set(READ_BY)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["algorithm={name: tram_x, distance: mmd}"], ["algorithm.distance", "task.name"]),
        (["algorithm={name: tram_x, mmd_kernel: rbf}"], ["algorithm.mmd_kernel", "algorithm.distance"]),
        (["algorithm={name: tram_x, renyi_order: 2.0}"], ["algorithm.renyi_order", "algorithm.distance"]),
        (["algorithm={name: tram_x, samsung_eta: 0.1}"], ["algorithm.samsung_eta", "algorithm.adaptive_filter"]),
        (["algorithm={name: tram_x, radius_min: 2.0, radius_max: 1.0}"], ["algorithm.radius_min", "radius_max"]),
        (
            ["algorithm={name: tram_x, student_mode: eval, reference_mode: paired}"],
            ["algorithm.reference_mode", "student_mode"],
        ),
        (["algorithm={name: tram_x, distance: renyi, renyi_order: 1.0}"], ["algorithm.renyi_order", "kl_forward"]),
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
        (["schedule={name: linear, warmup_steps: 11}"], ["schedule.warmup_steps", "train.steps"]),
        (["eval.select=best"], ["eval.select", "eval.every_steps"]),
        (["engine.config=zero2.json"], ["engine.config", "engine.name"]),
        (["model.compile=true", "engine={name: zero, config: zero3.json}"], ["model.compile", "ZeRO-3", "engine=fsdp2"]),
        (["engine={name: zero, config: shard.yaml}"], ["engine.config", "engine.name"]),
        (["task.train=Art", "task.exclude=[Art]"], ["task.exclude", "task.train"]),
        (["task={name: image_classification, data: x, seq_len: 8}"], ["task.seq_len", "task.name"]),
    ],
)
def test_contradictions_name_both_keys(overrides, keys, refusal):
    text = "\n".join(refusal(MINIMAL, *overrides))
    assert all(key in text for key in keys), text


@pytest.mark.parametrize("place", ["model.", "task.", "", "model.init."])
@pytest.mark.parametrize("value", ["true", "false"])
def test_remote_code_cannot_be_turned_on(place, value, refusal):
    (line,) = refusal(MINIMAL, f"{place}trust_remote_code={value}")
    assert "cannot be turned on" in line


def test_credentials_in_the_tracking_uri_are_refused_and_not_repeated(refusal):
    (line,) = refusal(MINIMAL, "tracking.uri=https://me:canary@host:5000/x")
    assert "MLFLOW_TRACKING_PASSWORD" in line and "canary" not in line


# Run folder, batch sizes, smoke


def test_run_dir_is_filled_in(recipe_of):
    assert recipe_of(MINIMAL, "train.seed=4").resolved_run_dir() == Path("runs/mine-sam-4")
    assert recipe_of(MINIMAL, "run_dir=/x/{{a}}/{seed}").resolved_run_dir() == Path("/x/{a}/0")


@pytest.mark.parametrize("run_dir", ["runs/{foo}", "{0}", "{}", "{seed!r}", "{seed:>9}", "{recipe.__class__}", "{seed", "''"])
def test_an_unknown_placeholder_is_refused(run_dir, refusal):
    (line,) = refusal(MINIMAL, f'run_dir="{run_dir}"' if run_dir != "''" else "run_dir=''")
    assert line.startswith("command line: run_dir")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-rf", "''", '"a\\nb"'])
def test_a_name_cannot_leave_the_folder(name, refusal):
    (line,) = refusal(MINIMAL, f"name={name}")
    assert ": name" in line


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [(16, 4, 2, 2), (16, 4, 4, 1), (8, 8, 1, 1), (30, 4, 2, "24 or 32"), (3, 2, 2, "train.global_batch: 4")],
)
def test_accumulation_follows_or_names_the_nearest_batches(batch, micro, ranks, expected, recipe_of):
    """30 = 3 x 8 + 6 lies between 24 and 32; below one unit of 4 only 4 is left."""
    recipe = recipe_of(MINIMAL, f"train.global_batch={batch}", f"train.micro_batch={micro}")
    if isinstance(expected, int):
        assert accumulation(recipe, ranks) == expected
    else:
        with pytest.raises(RecipeError, match=expected) as caught:
            accumulation(recipe, ranks)
        assert f"train.global_batch = {batch}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_smoke_keeps_what_is_tested_and_shrinks_the_rest(path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    full, tiny = load(path.name), load(path.name, smoke=True)
    for key in ("engine", "algorithm"):
        assert getattr(full, key) == getattr(tiny, key)
    assert tiny.optimizer == full.optimizer and tiny.schedule.name == full.schedule.name
    assert tiny.model.dtype == full.model.dtype
    assert tiny.model.activation_checkpointing == full.model.activation_checkpointing
    assert tiny.train.steps == 3 and accumulation(tiny, 3) == 2
    assert tiny.task.data in ("installed_docs", "generated") and tiny.tracking.uri is None
    assert tiny.resolved_run_dir() != full.resolved_run_dir()
    assert smoke(full) == tiny


def test_overrides_win_over_smoke(tmp_path):
    words = ["train.steps=5", f"run_dir={tmp_path}", f"task.data={tmp_path}", "task.train=math", "model.dtype=bfloat16"]
    tiny = load("quickstart", words, smoke=True)
    assert (tiny.train.steps, tiny.run_dir, tiny.task.data) == (5, str(tmp_path), str(tmp_path))
    assert tiny.task.train == "math" and tiny.model.dtype == "bfloat16"
    assert load("quickstart", ["task.train=numpy"], smoke=True).task.train is None, "that domain is the other data's"
    assert load("quickstart", ["train.steps=null", "train.epochs=2"], smoke=True).train.epochs is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("openai-community/gpt2-xl", "gpt2"),
        ("FacebookAI/xlm-roberta-base", "xlm-roberta"),
        ("FacebookAI/roberta-base", "roberta"),
        ("google-bert/bert-base-uncased", "bert"),
        ("microsoft/deberta-v3-base", "deberta-v2"),
        ("google/vit-base-patch16-224-in21k", "vit"),
        ("meta-llama/Llama-3.1-8B", "llama"),
        ("openlm-research/open_llama_7b_v2", "llama"),
        ("Qwen/Qwen3-8B", "qwen3"),
        ("Qwen/Qwen2.5-7B", "qwen2"),
        ("mistralai/Mistral-7B-v0.1", "mistral"),
        ("somewhere/unheard-of", "xlm-roberta"),  # the task's usual one
    ],
)
def test_smoke_trains_the_architecture_the_path_names(path, expected):
    assert recipe_model.family(path, "entailment") == expected


def test_a_local_model_names_its_own_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert recipe_model.family(str(tmp_path), "language_modeling") == "qwen3"


@pytest.mark.parametrize("kind", sorted({kind for _, kind in recipe_model.FAMILIES}))
def test_a_tiny_model_of_every_family_can_be_built(kind):
    from transformers import AutoConfig, AutoModel

    init = recipe_model.tiny(kind)
    config = AutoConfig.for_model(init.pop("architecture"), **init)
    if hasattr(config, "vocab_size"):
        config.vocab_size, config.pad_token_id = 100, 1
    assert sum(p.numel() for p in AutoModel.from_config(config).parameters()) < 200_000


# Engine configs


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[df]*/*.*")), ids=lambda path: path.stem)
def test_shipped_engine_configs_hold(path):
    config = engine_config(EngineSection(name="zero" if path.suffix == ".json" else "fsdp2", config=path.name))
    if path.suffix == ".json":
        assert config["zero_optimization"]["stage"] == int(path.stem[4])
        assert ("offload_optimizer" in config["zero_optimization"]) == path.stem.endswith("offload")
        assert config["zero_allow_untested_optimizer"] and not config["zero_force_ds_cpu_optimizer"]
    else:
        assert set(config) == {"reshard_after_forward", "shard_size", "offload"}


def test_engine_defaults():
    assert engine_config(EngineSection(name="zero"))["zero_optimization"]["stage"] == 2
    assert engine_config(EngineSection(name="fsdp2"))["offload"] is False
    assert engine_config(EngineSection()) == engine_config(EngineSection(name="replicated")) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"train_batch_size": 8}', "train.global_batch"),
        ('{"gradient_clipping": 1.0}', "train.clip_norm"),
        ('{"bf16": {"enabled": true}}', "model.dtype"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', "zero_optimization.reduce_bucket_size"),
        ('{"zero_optimization": {"round_robin_gradients": true}}', "round_robin_gradients"),
        ('{"zero_optimization": {"zero_quantized_weights": true}}', "zero_quantized_weights"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"a": NaN}', "NaN"),
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
    ],
)
def test_a_deepspeed_config_may_not_say_what_the_recipe_says(content, expected, refusal, tmp_path):
    (tmp_path / "own.json").write_text(content)
    (line,) = refusal(MINIMAL, "engine={name: zero, config: own.json}")
    assert line.startswith("command line: ") and "own.json" in line and expected in line


@pytest.mark.parametrize("content", ["shards: 3", "offload: yes", "shard_size: 0", "shard_size: true"])
def test_an_fsdp2_config_is_checked(content, refusal, tmp_path):
    (tmp_path / "own.yaml").write_text(content)
    (line,) = refusal(MINIMAL, "engine={name: fsdp2, config: own.yaml}")
    assert content.partition(":")[0] in line


# Project files


def test_constraints_pin_every_dependency_exactly_and_portably():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines), "no paths, URLs or local tags"
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~ ]", word)[0]).lower() for word in wanted}
    assert names - pinned == set()

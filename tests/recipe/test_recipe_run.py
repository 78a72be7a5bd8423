"""Recipes: what a run makes of them: its folder, batches, the smoke form, engine configs; and the
pinned packages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.made_recipes import MINIMAL, SHIPPED
from tram_ds.models import architecture as recipe_model
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.loading import load, smoke
from tram_ds.recipe.numbers import deciding
from tram_ds.recipe.recipe import RecipeError, accumulation, to_dict
from tram_ds.recipe.sections import EngineSection

ROOT = recipe_file.ROOT


# Run folder, batch sizes, smoke


def test_run_dir_is_filled_in(recipe_of):
    assert recipe_of(MINIMAL, "train.seed=4").resolved_run_dir() == Path("runs/mine-sam-4")
    assert recipe_of(MINIMAL, "run_dir=/x/{{a}}/{seed}").resolved_run_dir() == Path("/x/{a}/0")


@pytest.mark.parametrize(
    "run_dir",
    ["runs/{foo}", "{0}", "{}", "{seed!r}", "{seed:>9}", "{recipe.__class__}", "{seed", "''"],
)
def test_an_unknown_placeholder_is_refused(run_dir, refusal):
    (line,) = refusal(MINIMAL, f'run_dir="{run_dir}"' if run_dir != "''" else "run_dir=''")
    assert line.startswith("command line: run_dir")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-rf", "''", '"a\\nb"'])
def test_a_name_cannot_leave_the_folder(name, refusal):
    (line,) = refusal(MINIMAL, f"name={name}")
    assert ": name" in line


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [
        (16, 4, 2, 2),
        (16, 4, 4, 1),
        (8, 8, 1, 1),
        (30, 4, 2, "24 or 32"),
        (3, 2, 2, "train.global_batch=4"),
    ],
)
def test_accumulation_follows_or_names_the_nearest_batches(
    batch, micro, ranks, expected, recipe_of
):
    """30 = 3 x 8 + 6 lies between 24 and 32; below one unit of 4 only 4 is left."""
    recipe = recipe_of(MINIMAL, f"train.global_batch={batch}", f"train.micro_batch={micro}")
    if isinstance(expected, int):
        assert accumulation(recipe, ranks) == expected
    else:
        with pytest.raises(RecipeError, match=expected) as caught:
            accumulation(recipe, ranks)
        assert f"train.global_batch = {batch}" in str(caught.value) and "\n" not in str(
            caught.value
        )


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


def test_what_goes_by_the_length_the_domains_and_the_size_is_made_for_smoke():
    words = ["eval.domains=all", "eval.key=validation/fr/accuracy"]
    words.append("train.early_stopping.patience=2")
    tiny = load("xnli_xlmr", words, smoke=True)
    assert tiny.train.early_stopping is None
    assert (tiny.eval.domains, tiny.eval.key, tiny.eval.select) == (
        "all",
        "validation_loss",
        "best",
    )
    long = "eval.generate={prompts: [a long story], max_tokens: 999, each_validation: true}"
    generated = load("sft_llama", [long], smoke=True).eval.generate
    assert generated is not None and generated.each_validation
    assert (generated.prompts, generated.max_tokens) == (["The"], 4)


def test_the_data_of_smoke_is_no_stream_but_ones_own_is(recipe_of, tmp_path):
    words = ["task.data=rows", "task.streaming.buffer=7"]
    full = recipe_of(MINIMAL, *words)
    assert full.task.streaming is not None and smoke(full).task.streaming is None
    own = load(str(tmp_path / "mine.yaml"), words, smoke=True).task
    assert own.streaming is not None and (own.data, own.streaming.buffer) == ("rows", 7)


@pytest.mark.parametrize(
    ("key", "values"),
    [("train.effect_every", (5, None)), ("train.peak_tflops", (312.0, 989.0))],
)
def test_what_is_measured_on_the_way_separates_no_seeds(key, values, recipe_of):
    """Nor do probes, logs and the machine's speed: `compare` and MLflow join runs by the rest."""
    one, other = (to_dict(recipe_of(MINIMAL, f"{key}={v if v else 'null'}")) for v in values)
    assert one != other and deciding(one) == deciding(other)


def test_overrides_win_over_smoke(tmp_path):
    words = [
        "train.steps=5",
        f"run_dir={tmp_path}",
        f"task.data={tmp_path}",
        "task.train=math",
        "model.dtype=bfloat16",
    ]
    tiny = load("quickstart", words, smoke=True)
    assert (tiny.train.steps, tiny.run_dir, tiny.task.data) == (5, str(tmp_path), str(tmp_path))
    assert tiny.task.train == "math" and tiny.model.dtype == "bfloat16"
    assert load("quickstart", ["task.train=numpy"], smoke=True).task.train is None, (
        "that domain is the other data's"
    )
    assert (
        load("quickstart", ["train.steps=null", "train.epochs=2"], smoke=True).train.epochs is None
    )


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


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("[df]*/*.*")), ids=lambda path: path.stem
)
def test_shipped_engine_configs_hold(path):
    config = engine_config(
        EngineSection(name="zero" if path.suffix == ".json" else "fsdp2", config=path.name)
    )
    if path.suffix == ".json":
        assert config["zero_optimization"]["stage"] == int(path.stem[4])
        assert ("offload_optimizer" in config["zero_optimization"]) == path.stem.endswith("offload")
        assert config["zero_allow_untested_optimizer"] and not config["zero_force_ds_cpu_optimizer"]
    else:
        assert set(config) == {
            "reshard_after_forward",
            "shard_size",
            "offload",
            "reduce_every_micro_batch",
        }


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
        (
            '{"zero_optimization": {"reduce_bucket_size": "auto"}}',
            "zero_optimization.reduce_bucket_size",
        ),
        ('{"zero_optimization": {"round_robin_gradients": true}}', "round_robin_gradients"),
        ('{"zero_optimization": {"zero_quantized_weights": true}}', "zero_quantized_weights"),
        ('{"zero_optimization": {"zero_hpz_partition_size": 8}}', "zero_hpz_partition_size = 8"),
        ('{"zero_optimization": {"mics_shard_size": 4}}', "mics_shard_size = 4"),
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


@pytest.mark.parametrize(
    "content",
    [
        "shards: 3",
        "offload: yes",
        "shard_size: 0",
        "shard_size: true",
        "reduce_every_micro_batch: 1",
    ],
)
def test_an_fsdp2_config_is_checked(content, refusal, tmp_path):
    (tmp_path / "own.yaml").write_text(content)
    (line,) = refusal(MINIMAL, "engine={name: fsdp2, config: own.yaml}")
    assert content.partition(":")[0] in line


# Project files


def test_constraints_pin_every_dependency_exactly_and_portably():
    lines = [
        x
        for x in (ROOT / "constraints.txt").read_text().splitlines()
        if x and not x.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines), (
        "no paths, URLs or local tags"
    )
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~ ]", word)[0]).lower() for word in wanted}
    assert names - pinned == set()

"""Other libraries' names lead to ours in one line; a flag or two words for an override too."""

from __future__ import annotations

from typing import get_args

import pytest

from tram_ds.cli import main as tram
from tram_ds.recipe import aliases
from tram_ds.recipe.file import RecipeError
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe, accumulation
from tram_ds.recipe.task_section import task_names
from tram_ds.runtime.checked import keys_of


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load("xnli_xlmr", overrides)
    text = str(error.value)
    assert text.startswith("command line: ") and "\n" not in text
    return text


def known() -> set[str]:
    dotted = {f"{s}.{k}".lstrip(".") for s, keys in keys_of(Recipe).items() for k in keys}
    return dotted | set(keys_of(Recipe))


@pytest.mark.parametrize("name", aliases.ALIASES)
def test_an_alias_names_a_key_that_is_there(name: str) -> None:
    ours, more = aliases.ALIASES[name]
    assert ours or more
    for key in ours.split(" and ") if ours else ():
        assert key in known()
    line = refused(f"{name}=1")
    assert f"unknown key '{name}'" in line and (f"here it is {ours}" if ours else more) in line
    if ours and ours.partition(".")[0] in keys_of(Recipe) and name not in known():
        section = "train" if not ours.endswith(f".{name}") else "eval"
        assert f"here it is {ours}" in refused(f"{section}.{name}=1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("learning_rate=1e-5", "here it is optimizer.lr"),
        ("output_dir=out", "here it is run_dir"),
        ("num_train_epochs=3", "here it is train.epochs"),
        ("warmup_ratio=0.1", "here it is schedule.warmup_steps (in steps: warmup_ratio x"),
        ("per_device_train_batch_size=4", "here it is train.micro_batch (global_batch counts over"),
        ("bf16=true", "model.dtype=bfloat16; masters stay fp32"),
        ("fp16=true", "vanish in fp16: use model.dtype=bfloat16"),
        ("lora={r: 8}", "did you mean model.lora?"),
        ("peft_config=x", "here it is model.lora (model.lora={r: 16"),
        ("deepspeed=ds.json", "engine={name: zero, config: zero3.json}"),
        ("gradient_clip_val=1.0", "here it is train.clip_norm"),
        ("devices=8", "the launcher says it: torchrun --nproc_per_node N"),
        ("offload_optimizer={device: cpu}", "config: zero2_offload.json}"),
        ("trust_remote_code=true", "cannot be turned on"),
        ("train.max_grad_norm=1.0", "here it is train.clip_norm"),
        ("model.torch_dtype=bf16", "here it is model.dtype"),
        ("task.name=causal_lm", "here it is language_modeling"),
        ("model.dtype=fp16", "vanish in fp16"),
        ("engine=deepspeed", "here it is zero"),
        ("optimizer.name=adamw_torch", "here it is adamw"),
    ],
)
def test_people_words(given: str, expected: str) -> None:
    assert expected in refused(given)


@pytest.mark.parametrize("key", aliases.VALUES)
def test_a_value_of_others_names_ours(key: str) -> None:
    section, _, name = key.partition(".")
    kind = Recipe.model_fields[section].annotation
    assert kind is not None
    allowed = get_args(kind.model_fields[name].annotation) or task_names()
    for theirs, ours in aliases.VALUES[key].items():
        assert f"here it is {ours}" in refused(f"{key}={theirs}")
        assert ours.split(",")[0] in allowed or ours == aliases.HALF
        assert theirs not in allowed


def test_only_a_close_key_of_another_section_is_proposed() -> None:
    assert "did you mean 'train.global_batch'?" in refused("optimizer.global_bacth=3")
    assert "did you mean" not in refused("optimizer.bathces=3")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.steps", "3"], "write train.steps=3"),
        (["--train.steps", "3"], "write train.steps=3"),
        (["train.steps"], "write train.steps=VALUE"),
        (["--learning_rate", "1e-5"], "--learning_rate: here it is optimizer.lr"),
        (["--num-train-epochs=2"], "--num-train-epochs: here it is train.epochs"),
        (["--resume_from_checkpoint", "x"], "a flag of the command line: --resume"),
    ],
)
def test_a_slip_of_the_command_line_is_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tram.main(["train", "--recipe", "quickstart", "--dry-run", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_a_flag_with_a_dot_is_the_override(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "quickstart", "--dry-run", "--train.steps=3"]
    assert tram.main(["train", *words, "--schedule.warmup_steps=0"]) == 0
    assert "\n  steps: 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        # 16 sequences: 16 / 8 = 2 each; 4 x 4 = 16; the next multiple of 32 is 32
        (8, "train.micro_batch=2, or 4 ranks, or another experiment: train.global_batch=32"),
        # 16 / 3 is not whole; 2 x 4 = 8 divides 16; multiples of 12 beside 16
        (3, "2 ranks, or another experiment: train.global_batch=12 or 24"),
    ],
)
def test_the_harmless_ways_come_first(world: int, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        accumulation(load("m2d2_s2orc_gpt2"), world)
    assert str(error.value).endswith(f": {expected}")

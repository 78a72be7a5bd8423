"""A large model on a machine without a GPU is told what it would need, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tram_ds.planning import without_gpu
from tram_ds.planning.plan import plan
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.ranks import Job


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", asked)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def on(ranks: int, device: str = "cpu") -> Job:
    return Job(0, 0, ranks, "torchrun", torch.device(device))


def with_memory(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    monkeypatch.setattr(without_gpu, "machine_memory", lambda: memory)


@pytest.mark.parametrize(
    ("name", "ranks"), [("m2d2_gpt2xl", 1), ("m2d2_gpt2xl", 4), ("xnli_xlmr", 2)]
)
def test_what_does_not_fit_is_refused_with_the_plans_memory(
    name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(name)
    needed = plan(recipe, ranks).memory.total
    with_memory(monkeypatch, ranks * needed - 1e9)
    told = rf"no GPU here, and .* {needed / 1e9:.1f} GB for each of {ranks} rank.*--smoke"
    with pytest.raises(ValueError, match=told):
        without_gpu.check(recipe, on(ranks))


def test_what_fits_is_told_how_long_a_step_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load("m2d2_gpt2xl")
    with_memory(monkeypatch, 1e12)
    without_gpu.check(recipe, on(1))
    (line,) = capsys.readouterr().err.splitlines()
    minutes = plan(recipe, 1).cost.model_flops / 1e12 / 60
    assert f"at 1 TFLOP/s a step takes {minutes:.1f} minutes" in line and minutes > 1


def test_a_gpu_a_small_folder_and_an_unknown_path_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_memory(monkeypatch, 0.0)
    (tmp_path / "model.safetensors").write_bytes(b"small")
    without_gpu.check(load("m2d2_gpt2xl"), on(1, "cuda"))
    for path in (str(tmp_path), "somebody/unknown"):
        without_gpu.check(load("m2d2_gpt2xl", [f"model.path={path}"]), on(1))
    assert capsys.readouterr() == ("", "")


def test_no_model_of_a_recipe_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 0.0)
    recipe: Recipe = load("m2d2_gpt2xl", smoke=True)
    without_gpu.check(recipe, on(1))
    assert recipe.model.path is None

"""model.lora: which layers get adapters, that they begin as nothing, and that what is exported is
what was trained, to plain peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from tram_ds.algorithms.stepper import wrap
from tram_ds.checkpoint.adapter_export import add_merged, export_adapter, read_adapter
from tram_ds.models.adapters import NAME, file_names
from tram_ds.models.pretrained import load_base, load_model, load_outline, load_stored
from tram_ds.planning import sizes
from tram_ds.recipe.loading import load
from tram_ds.recipe.model_section import LoraSection, ModelSection
from tram_ds.recipe.recipe import RecipeError
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.peers import Peers

peft = pytest.importorskip("peft", reason="peft is not installed")

LLAMA: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VIT: dict[str, Any] = {
    "architecture": "vit",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
IDS = torch.arange(16).view(2, 8)


def section(path: Path | None = None, **keys: Any) -> ModelSection:
    source = {"init": LLAMA} if path is None else {"path": str(path)}
    return ModelSection(**source, lora=LoraSection(**{"r": 4, "alpha": 8.0, **keys}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def filled(model: Any) -> Any:
    """As after training: B is not zero, nor is anything what it was."""
    for index, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
    return model


def adapted_layers(model: Any) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def test_every_linear_layer_but_the_head_has_an_adapter_and_alone_trains() -> None:
    model = load_model(AutoModelForCausalLM, section())
    ends = {name.rpartition(".")[2] for name in adapted_layers(model)}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj"} | mlp
    assert len(adapted_layers(model)) == 2 * 7
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained) and len(trained) == 2 * 2 * 7


@pytest.mark.parametrize("dora", (False, True))
def test_at_the_start_they_are_the_model_without_them(dora: bool) -> None:
    adapted = load_model(AutoModelForCausalLM, section(dora=dora), seed=3)
    bare = load_base(AutoModelForCausalLM, section(), seed=3)
    torch.testing.assert_close(logits(adapted), logits(bare), rtol=0, atol=1e-6)
    assert dora or torch.equal(logits(adapted), logits(bare))


def test_a_base_left_in_its_files_has_the_same_adapters(tmp_path: Path) -> None:
    load_base(AutoModelForCausalLM, section()).save_pretrained(tmp_path)
    whole, stored = (f(AutoModelForCausalLM, section(tmp_path)) for f in (load_model, load_stored))
    values = dict(whole.named_parameters())
    for name, p in stored.named_parameters():
        assert p.is_meta != p.requires_grad
        into = torch.empty(p.numel())
        stored.stored.read(name, 0, into)
        assert torch.equal(into, values[name].detach().flatten()), name


@pytest.mark.parametrize("source", ("init", "path"))
def test_a_classifiers_head_is_there_though_its_base_is_not(source: str, tmp_path: Path) -> None:
    """Its own, of the file or of the seed: peft trains a copy of it."""
    load_base(AutoModelForImageClassification, ModelSection(init=VIT), seed=2).save_pretrained(
        tmp_path
    )
    where: dict[str, Any] = {"init": VIT} if source == "init" else {"path": str(tmp_path)}
    images = ModelSection(**where, lora=LoraSection(r=2))
    whole, stored = (
        f(AutoModelForImageClassification, images, seed=2) for f in (load_model, load_stored)
    )
    values = dict(whole.named_parameters())
    trained = {n for n, p in stored.named_parameters() if p.requires_grad}
    assert f"classifier.modules_to_save.{NAME}.weight" in trained
    for name, p in stored.named_parameters():
        assert not (p.is_meta and p.requires_grad), name
        into = torch.empty(p.numel())
        stored.stored.read(name, 0, into)
        assert torch.equal(into, values[name].detach().flatten()), name


@pytest.mark.parametrize(
    "targets, said",
    [
        (["q_prj"], "q_prj is no linear layer of Llama.*; did you mean 'q_proj'.; it has"),
        (["q_proj", "norm"], "norm is no linear layer.*down_proj, gate_proj, k_proj, lm_head"),
    ],
)
def test_targets_that_are_not_there_name_those_that_are(targets: list[str], said: str) -> None:
    for loading in (load_outline, load_model):  # before any weight, and again
        with pytest.raises(DataError, match=said):
            loading(AutoModelForCausalLM, section(targets=targets))


def test_targets_are_adapted_and_nothing_else() -> None:
    model = load_model(AutoModelForCausalLM, section(targets=["q_proj", "layers.1.mlp.up_proj"]))
    layers = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert adapted_layers(model) == layers | {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("dora", (False, True))
def test_an_export_is_what_was_trained_to_plain_peft_and_merged(dora: bool, tmp_path: Path) -> None:
    model = filled(load_model(AutoModelForCausalLM, section(dora=dora)))
    adapters = [p for p in model.parameters() if p.requires_grad]
    engine = wrap(model, torch.optim.SGD(adapters, lr=0.1), "base").engine
    want, trained = logits(model), engine.params().clone()
    bare = load_base(AutoModelForCausalLM, section())
    assert (want - logits(bare)).abs().max() > 0.01, "the adapters do something"
    export_adapter(engine, tmp_path / "export", Peers(1))
    with engine.moved(to=trained * 0.5):
        assert read_adapter(engine, tmp_path / "export").equal(trained)
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "export/adapter")
    torch.testing.assert_close(logits(theirs), want, rtol=0, atol=1e-6)
    add_merged(tmp_path / "export", load_base(AutoModelForCausalLM, section()))
    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-5)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (tmp_path / "export/adapter/adapter_model.safetensors").is_file()


def test_a_classifiers_head_trains_whole_and_is_in_the_adapters_file() -> None:
    images = ModelSection(init=VIT, lora=LoraSection(r=2))
    model = load_model(AutoModelForImageClassification, images)
    whole = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert whole == {f"classifier.modules_to_save.{NAME}.{n}" for n in ("weight", "bias")}
    assert not any("classifier" in name for name in adapted_layers(model))
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= set(
        file_names(model)
    )


def test_a_plan_counts_what_trains() -> None:
    """Rank 4: 4 (inputs + outputs) for each layer; q, k, v, o, and three of the MLP, twice."""
    shapes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    words = [f"model={{init: {LLAMA}, lora: {{r: 4}}}}".replace("'", ""), "task.data=generated"]
    size = sizes.size(load("llama_lora", words))
    assert size.trained == 2 * size.trained_block == 2 * sum(4 * sum(shape) for shape in shapes)
    assert size.trained_root == 0 and not size.head_trained
    bare = sizes.size(load("llama_lora", [*words, "model.lora=null"]))
    assert bare.trained == bare.parameters == size.parameters - size.trained


def test_an_unknown_key_of_the_section_names_its_keys() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'rnk' in section 'model.lora' \(it has r,"):
        load("llama_lora", ["model.lora.rnk=8"])
    with pytest.raises(RecipeError, match=r"model.lora.targets = \[\]: nothing to adapt"):
        load("llama_lora", ["model.lora.targets=[]"])

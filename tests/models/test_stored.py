"""A model left in its files, and read from there by whoever holds a piece of it, is the model that
from_pretrained loads, and one that is drawn piece by piece is the one that its seed makes: every
parameter, buffer, tie and new head, on every engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests import ranks
from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.models.stored import CHUNK, Entry, Stored, entries
from tram_ds.recipe.model_section import ModelSection
from tram_ds.runtime.errors import DataError

TINY = {
    "gpt2": {"vocab_size": 49, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {
        "vocab_size": 49,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
CAUSAL, CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def saved(folder, kind, dtype=torch.float32, **options):
    config = AutoConfig.for_model(kind, **TINY[kind], bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, **options)
    return folder


def without_prefix(folder, prefix="transformer."):
    """As the hub has GPT-2: names of the base model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k.removeprefix(prefix): t for k, t in tensors.items()}, file, {"format": "pt"})
    return folder


def pickled(folder, like):
    """As `like`, in two files of pickles, the tied head beside its embedding in the second."""
    AutoConfig.from_pretrained(like).save_pretrained(folder)
    state = AutoModelForCausalLM.from_pretrained(like).state_dict()
    where = {name: f"part-{int('wte' in name or 'lm_head' in name)}.bin" for name in state}
    for file in set(where.values()):
        torch.save({name: t for name, t in state.items() if where[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {
        "fp32": saved(root / "fp32", "gpt2"),
        "bf16": saved(root / "bf16", "llama", torch.bfloat16),
        "index": saved(root / "index", "gpt2", max_shard_size="6KB"),
        "hub names": without_prefix(saved(root / "hub", "gpt2")),
    }
    return {**found, "pickles": pickled(root / "pickles", found["fp32"])}


@pytest.fixture(scope="module")
def cases(folders, tmp_path_factory):
    def case(name, auto=CAUSAL, half=False, frozen=None):
        return {"path": str(folders[name]), "auto": auto, "half": half, "frozen": frozen}

    def fresh(kind, auto=CAUSAL, half=False, frozen=None):
        init = {"architecture": kind, **TINY[kind]}
        return {"init": init, "auto": auto, "half": half, "frozen": frozen}

    found = {
        "an fp32 file, tied": case("fp32"),
        "a bf16 file, bf16 working copy": case("bf16", half=True),
        "an index, bf16 working copy": case("index", half=True),
        "hub names": case("hub names"),
        "pickles, tied": case("pickles"),
        "a new head": case("bf16", CLASSES, half=True),
        "frozen blocks": case("bf16", half=True, frozen="layers.0."),
        "drawn, tied": fresh("gpt2"),
        "drawn, frozen blocks, bf16 working copy": fresh("llama", CLASSES, True, "layers.0."),
    }
    file = tmp_path_factory.mktemp("cases") / "cases.json"
    file.write_text(json.dumps(found))
    return file


@pytest.mark.parametrize(
    "world, names",
    [
        (1, "fsdp2"),
        (2, "fsdp2"),
        (3, "fsdp2"),
        (2, "ddp"),
        (1, "zero3"),
        (2, "zero0,zero1,zero2,zero3"),
        (3, "zero2,zero3"),
    ],
)
def test_every_engine_holds_the_same_as_from_a_whole_model(cases, world, names):
    found = ranks.run("tests.models.stored_worker", str(cases), names, world=world)
    assert len(found) == 9 and all(set(each) == set(names.split(",")) for each in found.values())
    for case, engines in found.items():
        for name, every in engines.items():
            for rank, ways in enumerate(every):
                assert ways["whole"] == ways["stored"], (case, name, rank)


def section(path):
    return ModelSection(path=str(path))


@pytest.mark.parametrize("name", ["fp32", "bf16", "index", "hub names"])
def test_any_slice_of_any_parameter(folders, name):
    whole: Any = load_model(AutoModelForCausalLM, section(folders[name]))
    left: Any = load_stored(AutoModelForCausalLM, section(folders[name]))
    assert all(p.is_meta for p in left.parameters())
    assert [n for n, _ in left.named_parameters()] == [n for n, _ in whole.named_parameters()]
    for key, parameter in whole.named_parameters():
        flat = parameter.detach().flatten()
        for start, stop in ((0, len(flat)), (1, len(flat)), (len(flat) // 3, len(flat) // 2)):
            into = torch.empty(stop - start)
            left.stored.read(key, start, into)
            assert torch.equal(into, flat[start:stop]), (key, start, stop)
    for (key, one), (other, two) in zip(whole.named_buffers(), left.named_buffers(), strict=True):
        assert key == other and one.dtype == two.dtype and torch.equal(one, two)


def test_what_an_export_says_beside_the_weights_is_the_same(folders):
    whole, left = (
        f(AutoModelForCausalLM, section(folders["fp32"])) for f in (load_model, load_stored)
    )
    assert whole.config.to_dict() == left.config.to_dict()
    assert whole.generation_config.to_dict() == left.generation_config.to_dict()


def test_a_span_longer_than_a_chunk(tmp_path):
    """Rows 0.. of 3 x (CHUNK / 2) elements: read in two parts of two rows and one."""
    values = torch.arange(3 * (CHUNK // 2), dtype=torch.float32).view(3, -1)
    save_file({"w": values}, tmp_path / "w.safetensors")
    entry = Entry(tmp_path / "w.safetensors", "w", tuple(values.shape), "F32")
    into = torch.empty(values.numel() - 5)
    Stored({"w": entry}, {}).read("w", 5, into)
    assert torch.equal(into, values.flatten()[5:])


def test_a_new_head_is_drawn_as_when_all_is_loaded(folders):
    each: list[Any] = [
        load(AutoModelForSequenceClassification, section(folders["bf16"]), seed=9, new_head=True)
        for load in (load_model, load_stored)
    ]
    head = each[0].score.weight.detach()
    assert torch.equal(each[1].score.weight, head) and each[1].new_weights == ["score.weight"]
    into = torch.empty(4)
    each[1].stored.read("score.weight", 3, into)
    assert torch.equal(into, head.flatten()[3:7])


def test_a_model_whose_tensors_are_merged_is_loaded_whole_and_said_so(tmp_path):
    """Experts lie one by one in Mixtral's files, and are one tensor in its model."""
    config = AutoConfig.for_model(
        "mixtral", **TINY["llama"], num_local_experts=2, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    left: Any = load_stored(AutoModelForCausalLM, section(tmp_path))
    assert "converts its model.layers.0" in left.loaded_whole
    for one, two in zip(model.parameters(), left.parameters(), strict=True):
        assert torch.equal(one, two)


def truncated(folder):
    file = sorted(folder.glob("model-*"))[-1]
    file.write_bytes(file.read_bytes()[:-40])


def absent(folder):
    sorted(folder.glob("model-*"))[0].unlink()


def unnamed(folder):
    """A shard that lacks a tensor the index says it has."""
    file = sorted(folder.glob("model-*"))[0]
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file, {"format": "pt"})


def misshapen(folder):
    file = next(
        f for f in sorted(folder.glob("model-*")) if "transformer.ln_f.bias" in load_file(f)
    )
    tensors = load_file(file)
    tensors["transformer.ln_f.bias"] = torch.zeros(7)
    save_file(tensors, file, {"format": "pt"})


def in_excess(folder):
    index = folder / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    file = next(iter(text["weight_map"].values()))
    save_file(
        {**load_file(folder / file), "spare": torch.zeros(2)}, folder / file, {"format": "pt"}
    )
    text["weight_map"]["spare"] = file
    index.write_text(json.dumps(text))


def not_an_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize("load", [load_model, load_stored])
@pytest.mark.parametrize(
    "spoil, says",
    [
        (truncated, "is cut or no safetensors file"),
        (absent, "lacks model-00001-of-.* shards"),
        (unnamed, "lacks transformer.* places there"),
        (misshapen, "cannot build|lacks|size|shape"),
        (in_excess, r"has in excess 1 weights \(spare\) of GPT2LMHeadModel"),
        (not_an_index, "is damaged"),
    ],
)
def test_a_broken_set_of_files_is_named(tmp_path, load, spoil, says):
    saved(tmp_path, "gpt2", max_shard_size="6KB")
    spoil(tmp_path)
    with pytest.raises(DataError, match=says) as caught:
        load(AutoModelForCausalLM, section(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_that_is_none_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json is not an index of weights .* copy or"):
        entries(str(tmp_path), "main")

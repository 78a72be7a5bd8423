"""An export read back is the weights it was made from, for every architecture the recipes use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from tests import ranks
from tests.faults.forked import forked
from tests.faults.test_storage import mounted
from tram_ds.algorithms.stepper import wrap
from tram_ds.checkpoint import export_layout, space
from tram_ds.checkpoint.export import export, full_state, read_export
from tram_ds.engines.protocol import Engine
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers

BLOCK = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
WORDS = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (AutoModelForCausalLM, {"n_layer": 1, "n_embd": 8, "n_head": 2, **WORDS}),
    "llama": (AutoModelForCausalLM, {**BLOCK, **WORDS}),
    # its experts lie one by one in files, and are one tensor in the module: exported whole
    "mixtral": (AutoModelForCausalLM, {**BLOCK, **WORDS, "num_local_experts": 2}),
    "xlm-roberta": (
        AutoModelForSequenceClassification,
        {**BLOCK, "vocab_size": 11, "num_labels": 3},
    ),
    "vit": (AutoModelForImageClassification, {**BLOCK, "image_size": 8, "patch_size": 4}),
}


def built(architecture: str) -> Engine:
    auto, fields = TINY[architecture]
    model = auto.from_config(AutoConfig.for_model(architecture, **fields))
    return wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "base").engine


@pytest.mark.parametrize("architecture", TINY)
def test_what_is_exported_reads_back(architecture: str, tmp_path: Path) -> None:
    engine = built(architecture)
    model = engine.module
    want = engine.params().clone()
    export(engine, tmp_path / "export", Peers(1))
    with engine.moved(to=want * 0.5):  # what stands in the engine now is not what was exported
        found = read_export(engine, tmp_path / "export")
    assert found.equal(want)
    assert not (tmp_path / "export.partial").exists()
    state = full_state(engine)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in model.named_parameters()
    }


@pytest.mark.parametrize("architecture", TINY)
def test_the_files_are_those_of_save_pretrained(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same names, tensors and configuration, in the same files; a tensor longer than a
    chunk is written in several."""
    monkeypatch.setattr(export_layout, "CHUNK", 10)
    engine = built(architecture)
    module: Any = engine.module
    export(engine, tmp_path / "ours", Peers(1), max_shard_size="1KB")
    module.save_pretrained(tmp_path / "theirs", max_shard_size="1KB")
    theirs = sorted((tmp_path / "theirs").iterdir())
    if architecture == "mixtral":  # not cut: transformers' own default size
        assert not list((tmp_path / "ours").glob("*-of-*"))
        return
    assert [p.name for p in sorted((tmp_path / "ours").iterdir())] == [p.name for p in theirs]
    for file in theirs:
        ours = tmp_path / "ours" / file.name
        if file.suffix == ".json":
            want = json.loads(file.read_text())
            want.get("metadata", {}).pop("total_parameters", None)  # nobody reads it
            assert json.loads(ours.read_text()) == want, file.name
        else:
            assert load_file(ours).keys() == load_file(file).keys()
            for name, tensor in load_file(file).items():
                assert torch.equal(load_file(ours)[name], tensor), name


@pytest.mark.parametrize(
    "world, names", [(2, "ddp,fsdp2,hybrid,zero0,zero1,zero3"), (3, "fsdp2,zero2,zero3")]
)
def test_every_engine_exports_its_masters(tmp_path: Path, world: int, names: str) -> None:
    """Bit for bit, -0.0 too, in both dtypes, also where the ranks do not share the folder; and
    what a rank reads of it is what it holds."""
    found = ranks.run("tests.checkpoint.export_worker", str(tmp_path), names, world=world)
    assert found.keys() == set(names.split(","))
    for name, cases in found.items():
        assert len(cases) == 6
        for case, wrong in cases.items():
            assert wrong == [], (name, case)


def test_an_export_on_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    engine = built("gpt2")
    with mounted(tmp_path / "small", "-o", "size=256k"):
        old = tmp_path / "small" / "export"
        export(engine, old, Peers(1))
        before = (old / "model.safetensors").read_bytes()
        filler = tmp_path / "small" / "filler"
        filler.write_bytes(bytes(space.free(old) - len(before)))  # the configs need some too
        with pytest.raises(CheckpointError, match=r"writing .*export failed .* No space left"):
            export(engine, old, Peers(1))
        assert (old / "model.safetensors").read_bytes() == before
        assert sorted(p.name for p in old.parent.iterdir()) == ["export", "filler"]
        filler.unlink()
        export(engine, old, Peers(1))


@pytest.mark.faults
def test_kill_9_at_every_point_of_an_export_leaves_a_whole_one() -> None:
    found = forked([("export_killed_at_every_point", 1, [])])[0]
    assert found["wrong"] == [] and len(found["points"]) > 10
    assert found["old"] > 5 and found["new"] >= 1
    assert found["old"] + found["new"] == len(found["points"])

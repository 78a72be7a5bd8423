"""Host memory of a run's phases on 2 ranks: a rank adds its own shards and no copy of the model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import ranks
from tram_ds.planning.host import SAVING

pytestmark = pytest.mark.bench
MIB = 1 << 20


# a Llama of 100 M parameters
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In a bf16 file, as current models are published."""
    config = AutoConfig.for_model("llama", **LLAMA)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(folder):
    """engine -> phase -> bytes added to each rank; loading once more of the whole model."""
    each = {
        engine: ranks.run("tests.bench.host_memory_worker", str(folder), engine, "stored")
        for engine in ("fsdp2", "zero3")
    }
    for engine, phases in each.items():
        whole = ranks.run("tests.bench.host_memory_worker", str(folder), engine, "whole")
        phases["loading whole"] = whole["loading"]
        shown = {k: [b // MIB for b in v] for k, v in phases.items() if isinstance(v, list)}
        print(f"{engine}, MiB of each rank: {shown}; 4 N / W is {shard(phases) // MIB}")
    return each


def shard(phases):
    """4 x N / W: a rank's part of one fp32 copy, in bytes."""
    return 4 * phases["parameters"] // 2


def test_loading_adds_a_ranks_shards_and_one_tensor(found):
    """4 x N / W bytes and the largest tensor, where whole loading adds more than 4 x N."""
    fsdp2 = found["fsdp2"]
    assert max(fsdp2["loading"]) <= shard(fsdp2) + 4 * fsdp2["largest"]
    assert min(fsdp2["loading whole"]) > 2 * shard(fsdp2)


def test_drawing_adds_a_ranks_shards_and_one_tensor():
    """model.init, which has no file: 4 x N / W bytes and the largest tensor, where whole drawing
    adds 4 x N; its modules and the states of the generator are less than 2 MiB."""
    init = json.dumps({"architecture": "llama", **LLAMA})
    left, whole = (
        ranks.run("tests.bench.host_memory_worker", init, "fsdp2", way) for way in ("left", "whole")
    )
    print(f"MiB of each rank: {[[b // MIB for b in way['loading']] for way in (left, whole)]}")
    assert max(left["loading"]) <= shard(left) + 4 * left["largest"] + 2 * MIB
    assert min(whole["loading"]) > 2 * shard(left)


def test_loading_under_zero3_adds_no_copy_of_the_model(found):
    """DeepSpeed's own states lie on the host of a machine without a GPU: what is left out is the
    whole model in fp32 (4 x N) beside them."""
    zero3 = found["zero3"]
    for stored, whole in zip(zero3["loading"], zero3["loading whole"], strict=True):
        assert whole - stored >= 2 * shard(zero3) * 0.9


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_saving_copies_nothing(found, engine):
    """Where a file of it alone is 4 x N / W, and theta with both moments 12: what is in the files
    is read where it trains, a few MiB at a time."""
    assert max(found[engine]["saving"]) <= 16 * MIB


def test_saving_in_the_background_holds_a_few_pieces(found):
    """16 MiB each, copied so that theta may move meanwhile, and what the allocator keeps."""
    assert max(found["fsdp2"]["saving in the background"]) <= SAVING


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_exporting_gathers_nothing(found, engine):
    assert max(found[engine]["exporting"]) <= 64 * MIB


def test_scoring_holds_less_than_the_model(found):
    """The parts that are gathered while they are used, where the model in fp32 is 4 x N. DeepSpeed
    may keep 1e9 parameters gathered (stage3_max_live_parameters), which is all of this one."""
    assert max(found["fsdp2"]["scoring"]) < 2 * shard(found["fsdp2"])


def test_resuming_fills_a_state_before_it_replaces_the_old_one(found):
    """theta and Adam's two moments, so that a checkpoint that cannot be read to its end leaves the
    weights as they were; beside them one tensor at a time."""
    fsdp2 = found["fsdp2"]
    assert max(fsdp2["resuming"]) <= 3 * shard(fsdp2) + 4 * fsdp2["largest"]

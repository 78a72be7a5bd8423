"""Host memory of loading: a rank adds its own shards and no copy of the model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import ranks

pytestmark = pytest.mark.bench
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 100 M parameters in a bf16 file, as current models are published."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def test_a_rank_of_fsdp2_adds_its_shards_and_one_tensor(folder):
    """4 x N / W bytes and the largest tensor, where whole loading adds more than 4 x N."""
    found = {
        way: ranks.run("tests.bench.loading_worker", str(folder), "fsdp2", way)
        for way in ("stored", "whole")
    }
    count, largest = found["stored"]["parameters"], found["stored"]["largest"]
    bound = 4 * count / 2 + 4 * largest
    for way, each in found.items():
        print(
            f"fsdp2 {way}: {[round(b / MIB) for b in each['added']]} MiB, bound {bound / MIB:.0f}"
        )
    assert all(added <= bound for added in found["stored"]["added"])
    assert all(added > 4 * count for added in found["whole"]["added"])


def test_a_rank_of_zero3_adds_no_copy_of_the_model(folder):
    """DeepSpeed's own states lie on the host of a machine without a GPU: what is left out is the
    whole model in fp32 (4 x N) beside them."""
    found = {
        way: ranks.run("tests.bench.loading_worker", str(folder), "zero3", way)
        for way in ("stored", "whole")
    }
    count = found["stored"]["parameters"]
    for way, each in found.items():
        print(f"zero3 {way}: {[round(b / MIB) for b in each['added']]} MiB")
    for stored, whole in zip(found["stored"]["added"], found["whole"]["added"], strict=True):
        assert whole - stored >= 4 * count * 0.9

"""An export read back is the weights it was made from, for every architecture the recipes use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from tram_ds.algorithms.stepper import wrap
from tram_ds.checkpoint.export import export, full_state, read_export

BLOCK = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
WORDS = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (AutoModelForCausalLM, {"n_layer": 1, "n_embd": 8, "n_head": 2, **WORDS}),
    "llama": (AutoModelForCausalLM, {**BLOCK, **WORDS}),
    "xlm-roberta": (
        AutoModelForSequenceClassification,
        {**BLOCK, "vocab_size": 11, "num_labels": 3},
    ),
    "vit": (AutoModelForImageClassification, {**BLOCK, "image_size": 8, "patch_size": 4}),
}


@pytest.mark.parametrize("architecture", TINY)
def test_what_is_exported_reads_back(architecture: str, tmp_path: Path) -> None:
    auto, fields = TINY[architecture]
    model = auto.from_config(AutoConfig.for_model(architecture, **fields))
    engine = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "base").engine
    want = engine.params().clone()
    export(engine, tmp_path / "export")
    with engine.moved(to=want * 0.5):  # what stands in the engine now is not what was exported
        found = read_export(engine, tmp_path / "export")
    assert found.equal(want)
    assert not (tmp_path / "export.partial").exists()
    state = full_state(engine)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in model.named_parameters()
    }

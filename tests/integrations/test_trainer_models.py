"""TramTrainer over other models than the page's: adapters of PEFT, classifiers, one it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from tests.integrations.plain import equal, made
from tram_ds.integrations import TramTrainer

peft = pytest.importorskip("peft", reason="peft is not installed")


def trainer(model: nn.Module, rows: Any, folder: Path, algorithm: str, **told: Any) -> TramTrainer:
    shared = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_steps": 2}
    arguments = TrainingArguments(
        str(folder), max_steps=4, learning_rate=0.05, logging_steps=1, **shared | told
    )
    return TramTrainer(model=model, args=arguments, train_dataset=rows, algorithm=algorithm)


def adapted() -> tuple[Any, Any]:
    model, rows = made()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"])), rows


def test_adapters_train_and_resume_and_the_base_stays(tmp_path: Path) -> None:
    (model, rows), base = adapted(), made()[0]
    trainer(model, rows, tmp_path, "tram_prev").train()
    for name, p in base.named_parameters():
        there = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
        assert torch.equal(there[f"base_model.model.{name}"], p), name
    again, rows = adapted()
    resumed = trainer(again, rows, tmp_path / "again", "tram_prev")
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert equal(model, again)


def test_a_classifier_learns_its_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=16, intermediate_size=8, num_labels=3, **shape)
    ids = torch.randint(16, (8, 5))
    rows = [{"input_ids": x, "labels": int(x[0]) % 3} for x in ids]
    found = trainer(BertForSequenceClassification(config), rows, tmp_path, "asam")
    found.train()
    losses = [entry["loss"] for entry in found.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_model_that_is_neither_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    model, rows = made()
    found = trainer(model.transformer, rows, tmp_path, "sam")
    with pytest.raises(ValueError, match=r"GPT2Model is no causal language model.*pass forward="):
        found.train()

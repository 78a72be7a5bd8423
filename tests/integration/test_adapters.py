"""A run of adapters from the command: stopped and resumed it is the same run, its checkpoints hold
adapters alone, and a target that is not there is exit 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.integration.test_own_data import losses, notes, train

pytestmark = pytest.mark.integration

SIZE = "architecture: gpt2, n_layer: 2, n_embd: 32, n_head: 2, vocab_size: 300"
LORA = f"model={{init: {{{SIZE}}}, lora: {{r: 2}}}}"
WORDS = (LORA, "algorithm=asam_mesa", "train.self_check=true", "eval.every_steps=2")


def test_a_run_of_adapters_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    notes(tmp_path)
    whole = train(tmp_path, *WORDS, "eval.select=best", "run_dir=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    run = tmp_path / "whole"
    made = sorted(p.name for p in (run / "export").glob("*"))
    assert {"adapter", "model.safetensors", "config.json", "tokenizer.json"} <= set(made)
    assert not (run / "best/model.safetensors").exists()
    parameters = json.loads((run / "checkpoints/step-00000004/manifest.json").read_text())
    assert all(".lora_" in name for name in parameters["parameters"])
    assert parameters["references"] == ["average"]
    for file in (run / "checkpoints/step-00000004").glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert all(".lora_" in key for key in stored.keys())  # noqa: SIM118
    stopped = train(tmp_path, *WORDS, "run_dir=again", "train.stop_after=2")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    resumed = train(tmp_path, *WORDS, "run_dir=again", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(tmp_path / "again") == losses(run) and len(losses(run)) == 4


def test_a_target_that_is_not_there_is_exit_2_before_a_run_folder_is_made(tmp_path: Path) -> None:
    notes(tmp_path)
    done = train(tmp_path, LORA, "model.lora.targets=[q_proj]", "run_dir=none")
    assert done.returncode == 2 and not (tmp_path / "none").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        "q_proj is no linear layer of GPT2LMHeadModel; did you mean 'c_proj'?; it has c_attn, c_fc"
        in line
    )

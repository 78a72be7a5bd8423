"""The command and the task file of docs/comparing.md: lm-evaluation-harness on the export of a run
finds what is computed by hand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.test_own_data import notes, train
from tests.ranks import ROOT, environment

pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")
pytestmark = [pytest.mark.integration, pytest.mark.slow]

PAGE = (ROOT / "docs/comparing.md").read_text()
ROWS = [{"question": f"note {i}:", "answer": ("here", "seen here")[i % 2]} for i in range(5)]


def by_hand(export: Path) -> tuple[float, float]:
    """(perplexity, share of answers that are the likeliest tokens)."""
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    logs, greedy = [], []
    for row in ROWS:
        asked = tokenizer(row["question"])["input_ids"]
        ids = torch.tensor([tokenizer(f"{row['question']} {row['answer']}")["input_ids"]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, len(asked) - 1 : -1].double().log_softmax(-1)
        answer = ids[0, len(asked) :]
        logs.append(log_p.gather(1, answer[:, None]).sum())
        greedy.append((log_p.argmax(-1) == answer).all().double())
    return torch.exp(-torch.stack(logs).mean()).item(), torch.stack(greedy).mean().item()


def test_the_documented_command_scores_an_export(tmp_path: Path) -> None:
    notes(tmp_path)
    export = "runs/own_text-tram_prev-0/export"
    done = train(tmp_path, f"run_dir={Path(export).parent}", "optimizer.lr=0.01")
    assert done.returncode == 0, done.stderr[-3000:]
    (task,) = re.findall(r"```yaml\n(task: answers\n.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"^    (lm_eval .*)$", PAGE, re.MULTILINE)
    assert export in command
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/answers.yaml").write_text(task)
    (tmp_path / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    # as `lm_eval`, which lies beside this interpreter where it is installed with it
    words = [sys.executable, "-m", *shlex.split(command)]
    env = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    scored = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert scored.returncode == 0, scored.stderr[-3000:]
    (file,) = (tmp_path / "scores").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["answers"]
    perplexity, acc = by_hand(tmp_path / export)
    assert found["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    assert found["acc,none"] == acc and len(ROWS) == 5

"""A run on a person's own file, from the command to results.json: stopped and resumed it is the
same run, and what cannot be used is said or is exit 2."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import ROOT, script

pytestmark = pytest.mark.integration

RECIPE = """
task: {name: language_modeling, data: notes.jsonl, column: body, domain_column: topic,
       train: birds, held_out: 0.2, seq_len: 16}
model: {init: {architecture: gpt2, n_layer: 2, n_embd: 32, n_head: 2, vocab_size: 300}}
algorithm: tram_prev
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 4, global_batch: 4, micro_batch: 1, self_check: false}
tracking: {enabled: false}
"""


def train(folder: Path, *words: str, world: int = 1) -> subprocess.CompletedProcess[str]:
    (folder / "tiny.yaml").write_text(RECIPE)
    words = ("--recipe", "tiny.yaml", *words, f"task.cache_dir={folder}/cache")
    return script(ROOT / "launch/train.py", *words, cwd=folder, world=world)


def notes(folder: Path) -> None:
    rows = [
        {"topic": ("birds", "trees")[i % 2], "body": f"note {i}: {'seen ' * (i % 5)}here"}
        for i in range(300)
    ]
    lines = [json.dumps(row) for row in [*rows, {"topic": "birds", "body": 7}]]
    (folder / "notes.jsonl").write_text("\n".join(lines))


def losses(run: Path) -> list[str]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [float(row["loss"]).hex() for row in rows if "loss" in row]


def test_a_run_on_a_file_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    notes(tmp_path)
    whole = train(tmp_path, "run_dir=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "task.held_out: 0.2 for valid and test, seed 0" in whole.stdout
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert results["task"]["left_out"] == "1 row: notes.jsonl line 301: body is 7, not text"
    assert set(results["scores"]["test"]) == {"birds", "trees"}
    assert set(results["zero_shot_average"]) == {"test"}
    stopped = train(tmp_path, "run_dir=again", "train.stop_after=2")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    resumed = train(tmp_path, "run_dir=again", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4


def test_a_file_without_the_column_is_exit_2_before_a_run_folder_is_made(tmp_path: Path) -> None:
    notes(tmp_path)
    done = train(tmp_path, "task.column=text", "run_dir=none")
    assert done.returncode == 2 and not (tmp_path / "none").exists()
    assert "notes.jsonl has no column text; it has topic, body: set task.column" in done.stderr


def test_conversations_are_resumed_to_the_same_bits_on_two_ranks(tmp_path: Path) -> None:
    """Whose caches both build at once; other topics are scored zero-shot."""
    rows = [
        {"topic": ("sums", "names")[i % 2], "prompt": f"What is {i}?", "completion": f"It is {i}."}
        for i in range(120)
    ]
    lines = [json.dumps(row) for row in [*rows, {"topic": "sums", "prompt": "Why?"}]]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    keys = "name: instruction, data: talks.jsonl, domain_column: topic, train: sums, held_out: 0.2"
    words = [f"task={{{keys}, seq_len: 48, cache_dir: cache}}", "algorithm=tram_x"]
    words.append('eval.generate={prompts: ["What is 5?"], max_tokens: 2}')
    whole = train(tmp_path, *words, "run_dir=whole", world=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert results["task"]["left_out"] == "1 row: talks.jsonl line 121: no completion"
    assert list(results["scores"]["test"]) == ["sums", "names"]
    assert [sample["prompt"] for sample in results["samples"]] == ["What is 5?"]
    zero_shot = results["scores"]["test"]["names"]["perplexity"]
    assert results["zero_shot_average"]["test"]["perplexity"] == zero_shot
    assert (tmp_path / "whole/export/chat_template.jinja").exists()
    stopped = train(tmp_path, *words, "run_dir=again", "train.stop_after=2", world=2)
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    resumed = train(tmp_path, *words, "run_dir=again", "--resume", world=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["fsdp2", "{name: zero, config: zero3.json}"])
def test_every_domain_is_measured_on_the_way_and_the_best_by_one_is_selected(
    tmp_path: Path, engine: str
) -> None:
    """On validation splits, which are scored at the end too: the same numbers at the step that is
    selected, of the lowest perplexity on trees. A domain without such a split is named. The samples
    are those of that step too, and what transformers generates from the export."""
    for domain, splits in DOMAINS.items():
        (tmp_path / "folder" / domain).mkdir(parents=True)
        for split in splits:
            text = " ".join(f"{domain} {split} {i * i}" for i in range(200))
            (tmp_path / "folder" / domain / f"{split}.txt").write_text(text)
    words = [
        "task={name: language_modeling, data: folder, train: birds, seq_len: 16}",
        "eval={every_steps: 1, domains: all, select: best, key: validation/trees/perplexity}",
        "eval.splits=[validation]",
        "optimizer.lr=0.3",  # so that it does not fall with every step
        "eval.generate={prompts: [birds, test 9], max_tokens: 4, each_validation: true}",
        f"engine={engine}",
    ]
    done = train(tmp_path, *words, "run_dir=run", world=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval.domains: without a validation split, not measured: rocks\n" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row for row in rows if "validation" in row}
    found = {step: row["validation"] for step, row in measured.items()}
    assert list(found) == [1, 2, 3, 4]
    lowest = min(found, key=lambda step: found[step]["trees"]["perplexity"])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["selected"]["step"] == lowest
    scores = results["scores"]["validation"]
    assert scores == {domain: found[lowest][domain] for domain in ("birds", "trees")}
    assert results["zero_shot_average"]["validation"] == found[lowest]["zero_shot"]
    assert measured[lowest]["samples"] == results["samples"]
    export = tmp_path / "run/export"
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    for sample in results["samples"]:
        ids = tokenizer(sample["prompt"], return_tensors="pt")
        (whole,) = model.generate(**ids, max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(whole[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["text"] == text


DOMAINS = {
    "birds": ("train", "valid", "test"),
    "trees": ("valid", "test"),
    "rocks": ("test",),
}


def test_a_stream_is_resumed_at_another_number_of_ranks(tmp_path: Path) -> None:
    """Which moves no row: losses differ by the order of their sums alone. Nothing is kept of the
    text but what the checkpoint needs to read on."""
    notes(tmp_path)
    words = ["task.domain_column=null", "task.train=null", "task.max_eval_tokens=200"]
    words.append("task.streaming={buffer: 7}")
    whole = train(tmp_path, *words, "run_dir=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "task.streaming: 7 rows shuffled at a time" in whole.stdout
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tokenizers"]
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert results["task"]["streaming"].endswith("1 pass begun")
    stopped = train(tmp_path, *words, "run_dir=again", "train.stop_after=2", world=2)
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    manifest = next((tmp_path / "again").rglob("manifest.json"))
    assert json.loads(manifest.read_text())["stream"]["position"] == 7  # of 8 rows read
    resumed = train(tmp_path, *words, "run_dir=again", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    expected, found = (
        [float.fromhex(loss) for loss in losses(tmp_path / name)] for name in ("whole", "again")
    )
    assert len(found) == 4 and found == pytest.approx(expected, abs=1e-6)

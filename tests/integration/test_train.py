"""launch/train.py as its users start it: files it leaves, numbers that do not depend on the engine,
errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT, environment, free_port, script, store
from tram_ds.evaluation import row_scores

pytestmark = pytest.mark.integration

TRAIN = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2"],
}
RECIPE = """
task: {name: language_modeling, data: generated, seq_len: 16, max_eval_tokens: 400}
model: {init: {architecture: gpt2, n_layer: 2, n_embd: 32, n_head: 2}}
algorithm: {name: tram_x, radius_scale: 5.0}
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 4, global_batch: 4, micro_batch: 1, clip_norm: 1.0, probe_every: 2}
"""


def launched(
    folder: Path, launcher: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """launch/train.py as its users start it, on a port of its own."""
    command = [*LAUNCHERS[launcher], TRAIN, *arguments]
    if launcher == "deepspeed":
        command[1:1] = ["--master_port", str(free_port())]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def train(folder: Path, *arguments: str, world: int = 1) -> subprocess.CompletedProcess[str]:
    """The same program on forked ranks."""
    (folder / "tiny.yaml").write_text(RECIPE)
    if not (folder / "mlflow.db").exists():
        store(folder)
    return script(TRAIN, "--recipe", "tiny.yaml", *arguments, cwd=folder, world=world)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run per engine, of the same recipe; each launcher itself starts one of them."""
    made = {}
    for name, launcher, engine in (
        ("single", "python", "replicated"),
        ("ddp", "torchrun", "replicated"),
        ("fsdp2", None, "fsdp2"),
        ("zero3", "deepspeed", "{name: zero, config: zero3.json}"),
    ):
        folder = tmp_path_factory.mktemp(name)
        (folder / "tiny.yaml").write_text(RECIPE)
        if name != "single":  # that one makes its database itself
            store(folder)
        words = ["--recipe", "tiny.yaml", f"engine={engine}"]
        if launcher is None:
            done = script(TRAIN, *words, cwd=folder, world=2)
        else:
            done = launched(folder, launcher, *words)
        assert done.returncode == 0, done.stderr[-4000:]
        made[name] = folder / "runs" / "tiny-tram_x-0"
        (folder / "stdout").write_text(done.stdout)
    return made


@pytest.mark.parametrize("name", ("single", "ddp", "fsdp2", "zero3"))
def test_a_run_leaves_its_files(runs: dict[str, Path], name: str) -> None:
    run_dir = runs[name]
    assert {p.name for p in run_dir.iterdir()} >= {
        "recipe.yaml",
        "metrics.jsonl",
        "results.json",
        "rows.npz",
        "export",
        "run_id",
        "DONE",
    }
    rows = records(run_dir)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all(
        {"loss", "distance", "radius", "perturbation_norm", "grad_norm", "lr", "tokens", "seconds"}
        <= set(r)
        for r in rows
    )
    assert all(r["tokens_per_second"] > 0 and "mfu" not in r for r in rows), (
        "nobody knows a CPU's peak"
    )
    assert all(r["tokens"] == 4 * 15 for r in rows)  # 4 blocks of 16 predict 15 tokens each
    assert all(
        r["radius"] == pytest.approx(5.0 * r["distance"]) and r["distance"] > 0 for r in rows
    )
    assert [("perturbation_length" in r) for r in rows] == [True, False, True, False]
    assert 0.99 < rows[0]["perturbation_cosine"] <= 1.0 + 1e-6 and rows[0][
        "perturbation_projection"
    ] == pytest.approx(1.0, abs=0.01)
    assert rows[0]["perturbation_length"] == pytest.approx(rows[0]["radius"], rel=1e-4)


@pytest.mark.parametrize("name", ("ddp", "fsdp2", "zero3"))
def test_numbers_do_not_depend_on_the_engine(runs: dict[str, Path], name: str) -> None:
    """Same micro-batches, same masks, same noise at 1 and 2 ranks: AdamW lets fp32 rounding grow,
    so 1e-4 after 4 steps."""
    for want, got in zip(records(runs["single"]), records(runs[name]), strict=True):
        for key in ("loss", "distance", "perturbed_loss", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=1e-4), (key, want["step"])
    scores = [
        json.loads((runs[n] / "results.json").read_text())["scores"]["test"]
        for n in ("single", name)
    ]
    assert list(scores[0]) == list(scores[1])
    for domain in scores[0]:
        assert scores[1][domain]["perplexity"] == pytest.approx(
            scores[0][domain]["perplexity"], rel=1e-4
        )
    one, other = (row_scores.read(runs[n] / "rows.npz")["test"] for n in ("single", name))
    for domain, rows in one.items():
        assert other[domain].digest == rows.digest
        assert other[domain].weight.tolist() == rows.weight.tolist()
        assert other[domain].value == pytest.approx(rows.value, rel=1e-4)
        assert rows.score == pytest.approx(scores[0][domain]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "world", "engine"),
    [
        ("single", 1, "replicated"),
        ("fsdp2", 2, "fsdp2"),
        ("zero3", 2, "{name: zero, config: zero3.json}"),
    ],
)
def test_mfu_is_recorded_where_the_recipe_gives_the_peak(
    runs: dict[str, Path], tmp_path: Path, name: str, world: int, engine: str
) -> None:
    """The pass that counts changes no number of the run."""
    done = train(
        tmp_path,
        f"engine={engine}",
        "train.peak_tflops=0.5",
        "train.log_every=2",
        "tracking.enabled=false",
        world=world,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = records(tmp_path / "runs" / "tiny-tram_x-0")
    assert all(0 < r["mfu"] <= 1 and r["tokens_per_second"] > 0 for r in rows)
    assert {r["step"]: r["loss"] for r in rows} == {
        r["step"]: r["loss"] for r in records(runs[name]) if r["step"] in (2, 4)
    }


@pytest.mark.parametrize("name", ("single", "fsdp2", "zero3"))
def test_the_export_reloads_with_its_ties_and_scores_the_same(
    runs: dict[str, Path], name: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tram_ds.evaluation.score import evaluate, zero_shot_average
    from tram_ds.recipe.loading import load
    from tram_ds.tasks import choose as tasks

    model = AutoModelForCausalLM.from_pretrained(runs[name] / "export", dtype=torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(AutoTokenizer.from_pretrained(runs[name] / "export")) > 2
    task = tasks.build(load(str(runs[name] / "recipe.yaml")))
    again = evaluate(model, task, task.eval_sets("test"), 3)
    results = json.loads((runs[name] / "results.json").read_text())
    for domain, score in again.items():
        assert score["perplexity"] == pytest.approx(
            results["scores"]["test"][domain]["perplexity"], rel=1e-5
        )
    average = results["zero_shot_average"]["test"]["perplexity"]
    assert average == pytest.approx(
        zero_shot_average(again, task.train_domains, "perplexity"), rel=1e-5
    )


def test_the_run_is_in_mlflow_and_finished(runs: dict[str, Path]) -> None:
    from mlflow.tracking import MlflowClient

    folder = runs["single"].parents[1]
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run((runs["single"] / "run_id").read_text().strip())
    assert run.info.status == "FINISHED"
    assert run.data.tags["algorithm"] == "tram_x"
    assert run.data.params["optimizer.lr"] == "0.001"
    losses = client.get_metric_history(run.info.run_id, "loss/train")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "tiny-tram_x"
    shared, found = parent.data.params, parent.data.metrics
    assert shared["algorithm.name"] == "tram_x" and "train.seed" not in shared
    assert found["final/test/zero_shot/perplexity"] > 1


def test_a_finished_run_is_left_alone(runs: dict[str, Path]) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in runs["single"].iterdir()}
    done = train(runs["single"].parents[1], "engine=replicated", "--resume")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert {p.name: p.stat().st_mtime_ns for p in runs["single"].iterdir()} == before


def test_dry_run_prints_a_recipe_that_loads_again(tmp_path: Path) -> None:
    done = train(tmp_path, "--dry-run", "train.seed=3")
    assert done.returncode == 0
    (tmp_path / "again.yaml").write_text(done.stdout)
    from tram_ds.recipe.loading import load
    from tram_ds.recipe.recipe import dump

    assert dump(load(str(tmp_path / "again.yaml"))) == done.stdout
    assert "seed: 3" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm=tram_pref"], ["algorithm", "tram_prev"]),
        (["algorithm.sigm=1"], ["sigm", "sigma"]),
        (["engine=zeroo"], ["engine", "zero"]),
        (["task.train=mathh"], ["mathh"]),
        (["task.seq_len=100000"], ["too short", "100000"]),
        (["algorithm={name: tram_x, distance: mmd}"], ["mmd", "language_modeling"]),
        (["train.global_batch=3", "train.micro_batch=2"], ["train.global_batch", "2 or 4"]),
        (["model.init.vocab_size=8"], ["vocab_size 8", "257"]),
        (["model.path=/nowhere", "model.init=null"], ["/nowhere"]),
    ],
    ids=lambda value: "" if isinstance(value, list) and " " in "".join(value) else str(value)[:40],
)
def test_a_mistake_is_one_line_and_exit_2(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    done = train(tmp_path, *overrides)
    assert done.returncode == 2, done.stderr[-2000:]
    message = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(message) == 1
    assert all(word in message[0] for word in words), message[0]
    assert "Traceback" not in done.stderr


def test_numbers_that_stop_being_numbers_end_the_run_with_exit_3(tmp_path: Path) -> None:
    done = train(
        tmp_path,
        "optimizer.lr=1e30",
        "tracking.enabled=false",
        "train.clip_norm=null",
        "train.steps=8",
        "train.max_skipped=2",
    )
    assert done.returncode == 3, done.stderr[-2000:]
    assert "2 steps in a row" in done.stderr
    rows = records(tmp_path / "runs" / "tiny-tram_x-0")
    assert [r["skipped"] for r in rows][-2:] == [1, 1]


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny-tram_x-0" / "checkpoints" / "step-00000002").mkdir(parents=True)
    done = train(tmp_path)
    assert done.returncode == 2
    assert "--resume" in done.stderr and "--overwrite" in done.stderr


def test_the_switches_of_the_lean_step_change_no_number(tmp_path: Path) -> None:
    """tram_prev with a checkpoint every second step: looking ahead is bitwise the swap, chunked
    logits are whole ones."""
    found = {}
    for name, key in (
        ("lean", "train.log_every=1"),
        ("swap", "algorithm.lookahead=false"),
        ("whole", "model.logits=whole"),
    ):
        arguments = (
            "algorithm={name: tram_prev, radius_scale: 50.0}",
            "checkpoint.every_steps=2",
            "model.dropout=0.1",
            "tracking.enabled=false",
        )
        done = train(tmp_path, *arguments, key, f"run_dir={name}")
        assert done.returncode == 0, done.stderr[-4000:]
        found[name] = [
            {k: r[k] for k in ("loss", "distance", "perturbed_loss", "grad_norm")}
            for r in records(tmp_path / name)
        ]
    assert found["lean"] == found["swap"]
    assert all(r["distance"] > 0 for r in found["lean"][1:])
    for lean, whole in zip(found["lean"], found["whole"], strict=True):
        assert lean == pytest.approx(whole, rel=1e-4, abs=1e-8)

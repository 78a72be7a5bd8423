"""launch/compare.py as its users start it: on a sweep's folders, and on real runs, from their
folders and from MLflow."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path

import pytest

from tests import made_runs
from tests.ranks import ROOT, script, store

pytestmark = pytest.mark.integration

RECIPE = """
task: {name: language_modeling, data: generated, seq_len: 16, max_eval_tokens: 400}
model: {init: {architecture: gpt2, n_layer: 2, n_embd: 32, n_head: 2}}
algorithm: base
optimizer: {name: adamw, lr: 1e-3}
train: {steps: 3, global_batch: 4, micro_batch: 2}
eval: {initial: true, every_steps: 1}
tracking: {experiment: tiny}
"""


def start(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return script(ROOT / "launch" / name, *arguments, cwd=folder)


def cells(text: str, block: str) -> dict[tuple[str, str], float]:
    rows = csv.DictReader(io.StringIO(text))
    return {
        (r["row"], r["column"]): float(r["value"])
        for r in rows
        if r["block"] == block and r["value"]
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real runs of 3 steps, tracked in a database beside them."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(RECIPE)
    store(folder)
    for algorithm in ("base", "tram_x"):
        done = start(folder, "train.py", "--recipe", "tiny.yaml", f"algorithm={algorithm}")
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_a_sweep_of_three_algorithms_and_two_seeds_in_one_command(tmp_path: Path) -> None:
    for i, algorithm in enumerate(("base", "sam", "tram_prev")):
        for seed in (0, 1):
            scores = {domain: 20.0 + k - i + 0.1 * seed for k, domain in enumerate(made_runs.S2ORC)}
            made_runs.write(tmp_path / "runs", made_runs.recipe(algorithm, seed), scores)
    done = start(
        tmp_path, "compare.py", "--report", "out", "--log", "--experiment", "made", "runs/*"
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "S2ORC perplexity",
        "ours minus the paper",
        "not enough seeds: 2 of 8",
        "against adam",
        "STEM average",
        "3 / 2",
    ):
        assert words in done.stdout
    assert "report: out/report.html" in done.stderr and "MLflow run: " in done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) == 3
    assert (tmp_path / "mlflow.db").exists()


def test_real_runs_from_their_folders(trained: Path) -> None:
    done = start(trained, "compare.py", "--format", "csv", "--report", "out")
    assert done.returncode == 0, done.stderr
    found = cells(done.stdout, "scores")
    for algorithm, row in (("base", "adamw"), ("tram_x", "tram_x")):
        results = json.loads(
            (trained / "runs" / f"tiny-{algorithm}-0" / "results.json").read_text()
        )
        assert found[row, "zs_avg"] == pytest.approx(
            results["zero_shot_average"]["test"]["perplexity"]
        )
        for domain, scores in results["scores"]["test"].items():
            assert found[row, domain] == pytest.approx(scores["perplexity"])
            assert found["pretrained", domain] == pytest.approx(
                results["initial"]["test"][domain]["perplexity"]
            )
    assert cells(done.stdout, "compute")["tram_x", "FLOP"] == pytest.approx(7 / 3)
    assert cells(done.stdout, "compute")["adamw", "loss, equal FLOP"] > 0
    assert "validation loss" in (trained / "out" / "report.html").read_text()


def test_real_runs_from_mlflow_are_the_same(trained: Path) -> None:
    folders = start(trained, "compare.py", "--format", "csv", "runs/*")
    tracked = start(trained, "compare.py", "--format", "csv", "--experiment", "tiny")
    assert tracked.returncode == 0, tracked.stderr
    for block in ("scores", "summary", "significance", "compute"):
        assert cells(tracked.stdout, block) == pytest.approx(
            cells(folders.stdout, block), rel=1e-9
        ), block


def test_an_unknown_experiment_is_one_line(trained: Path) -> None:
    done = start(trained, "compare.py", "--experiment", "tinny")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: --experiment tinny: MLflow has none of that name; it has "
    )
    assert "tiny" in done.stderr and "Traceback" not in done.stderr

"""The main job, as `make quickstart` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT, environment

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def quickstart(folder: Path, *overrides: str) -> str:
    command = [sys.executable, str(ROOT / "launch" / "quickstart.py"), *overrides]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def scores(folder: Path) -> tuple[dict[str, float], dict[str, float], list[str]]:
    results = json.loads((folder / "runs" / "quickstart-tram_prev-0" / "results.json").read_text())
    before, after = (
        {d: s["perplexity"] for d, s in results[key]["test"].items()}
        for key in ("initial", "scores")
    )
    return before, after, results["train_domains"]


def test_quickstart_on_installed_docs(tmp_path: Path) -> None:
    """In-domain perplexity falls; the table, the run folder and the database are named; 12 domains
    before and after."""
    printed = quickstart(tmp_path)
    before, after, trained = scores(tmp_path)
    assert trained == ["scipy"] and len(after) >= 8 and set(before) == set(after)
    assert after["scipy"] < 0.9 * before["scipy"]
    assert "scipy (trained)" in printed and "zero-shot average" in printed
    assert "run folder: runs/quickstart-tram_prev-0" in printed and "mlflow.db" in printed
    rows = [
        json.loads(line)
        for line in (tmp_path / "runs" / "quickstart-tram_prev-0" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    assert all(r["radius"] == r["distance"] > 0 and r["skipped"] == 0 for r in rows)

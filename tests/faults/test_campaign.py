"""The short form of the kill campaign; the long one is `python -m tests.faults.campaign --kills
200`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.ranks import ROOT, environment

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_random_kills_tear_no_checkpoint_and_change_no_result() -> None:
    command = [sys.executable, "-m", "tests.faults.campaign", "--kills", "10"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 10
    assert found["torn"] == 0 and found["different"] == 0

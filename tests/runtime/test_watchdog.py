"""The watchdog of a process that hangs where no collective would notice."""

from __future__ import annotations

import subprocess
import sys

from tests.ranks import ROOT


def test_it_names_rank_step_and_phase_prints_stacks_and_exits_6() -> None:
    script = (
        "import time\n"
        "from tram_ds.runtime.signals import Watchdog\n"
        "def stuck(): time.sleep(60)\n"
        "with Watchdog(3, 1.0).watching() as watchdog:\n"
        "    watchdog.beat('pass 2', 17)\n"
        "    stuck()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 6
    assert "rank 3: no progress" in done.stderr and "step 17, phase pass 2" in done.stderr
    assert "in stuck" in done.stderr


def test_beats_keep_it_quiet() -> None:
    script = (
        "import time\n"
        "from tram_ds.runtime.signals import Watchdog\n"
        "with Watchdog(0, 2.0).watching() as watchdog:\n"
        "    for step in range(10):\n"
        "        watchdog.beat('step', step)\n"
        "        time.sleep(0.25)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0 and done.stderr == ""

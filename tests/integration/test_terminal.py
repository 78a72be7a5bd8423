"""Every command without its terminal: closed streams, a reader that left, a full disk under the
log."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_train import RECIPE
from tests.ranks import ROOT, environment, free_port

pytestmark = pytest.mark.integration
BIN = Path(sys.executable).parent
PYTHON = f'"{sys.executable}"'
LAUNCHERS = {
    "python": PYTHON,
    "torchrun": f'"{BIN}/torchrun" --standalone --nproc_per_node 2',
    "deepspeed": f'"{BIN}/deepspeed" --num_accelerators 2 --master_port {free_port()}',
}
CLOSED, FULL, LEFT = "<&- >&- 2>&-", "> /dev/full 2> /dev/full", "2> err | true"


def command(
    folder: Path, line: str, redirected: str, launcher: str = "python", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`launch/LINE` with its streams as bash redirects them; the exit code is the launcher's."""
    whole = f'{LAUNCHERS[launcher]} "{ROOT}/launch/"{line} {redirected}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", whole],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def shown(folder: Path, done: subprocess.CompletedProcess[str]) -> str:
    err = folder / "err"
    return done.stdout + done.stderr + (err.read_text() if err.exists() else "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run each: whole, closed, full, left."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "s.yaml").write_text("base: tiny.yaml\ngrid: {train.seed: [0]}\n")
    for name, redirected in (("whole", ""), ("closed", CLOSED), ("full", FULL), ("left", LEFT)):
        line = f"train.py --recipe tiny.yaml engine=replicated run_dir={name}"
        done = command(folder, line, redirected)
        assert done.returncode == 0, name + shown(folder, done)
        assert "Traceback" not in shown(folder, done)
    return folder


def test_a_run_is_done_and_its_files_are_whole(runs: Path) -> None:
    """The same weights, bit for bit, and no text in them."""
    digests = set()
    for name in ("whole", "closed", "full", "left"):
        assert (runs / name / "DONE").exists() and (runs / name / "results.json").exists()
        weights = (runs / name / "export" / "model.safetensors").read_bytes()
        digests.add(hashlib.sha256(weights).hexdigest())
        assert len((runs / name / "metrics.jsonl").read_text().splitlines()) == 4
    assert len(digests) == 1


LINES = {
    "train --resume": ("train.py --recipe tiny.yaml engine=replicated run_dir=whole --resume", 0),
    "train --dry-run": ("train.py --recipe tiny.yaml --dry-run", 2),
    "train --help": ("train.py --help", 0),
    "evaluate": ("evaluate.py --recipe tiny.yaml --model whole --no-pretrained", 2),
    "compare": ("compare.py whole closed --report report", 2),
    "sweep": ("sweep.py --sweep s.yaml run_dir=whole engine=replicated", 0),
    "sweep --dry-run": ("sweep.py --sweep s.yaml --dry-run", 2),
    "submit": ("submit.py --recipe tiny.yaml --slurm cpu_test --dry-run", 2),
    "analyze": ("analyze.py --recipe tiny.yaml --export whole --what cka run_dir=whole", 0),
    "plan": ("plan.py --recipe tiny.yaml --gpus 2", 2),
    "doctor": ("doctor.py --recipe tiny.yaml --no-smoke engine=replicated run_dir=new", 0),
    "sync": ("sync.py whole", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_command_ends_as_with_a_terminal(runs: Path, name: str) -> None:
    """One whose work is its text is 2 where a disk cut that, and only there."""
    line, when_cut = LINES[name]
    for redirected, code in ((LEFT, 0), (CLOSED, 0), (FULL, when_cut)):
        done = command(runs, line, redirected)
        assert "Traceback" not in shown(runs, done)
        assert done.returncode == code, (redirected, shown(runs, done))


@pytest.mark.slow
@pytest.mark.parametrize("redirected", [LEFT, CLOSED, FULL])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_train_to_their_end(runs: Path, launcher: str, redirected: str) -> None:
    engine = "fsdp2" if launcher == "torchrun" else "zero"
    name = f"{launcher}-{[LEFT, CLOSED, FULL].index(redirected)}"
    line = f"train.py --recipe tiny.yaml engine={engine} run_dir={name}"
    command(runs, line, redirected, launcher)  # its own exit code and words are the launcher's
    assert (runs / name / "DONE").exists() and (runs / name / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("redirected", [LEFT, CLOSED, FULL])
def test_a_sweep_relays_its_launcher(runs: Path, redirected: str) -> None:
    name = f"cell-{[LEFT, CLOSED, FULL].index(redirected)}"
    launcher = LAUNCHERS["deepspeed"].replace('"', "")
    line = f'sweep.py --sweep s.yaml --launcher "{launcher}" engine=zero run_dir={name}'
    done = command(runs, line, redirected)
    assert done.returncode == 0 and "Traceback" not in shown(runs, done)
    assert (runs / name / "DONE").exists()

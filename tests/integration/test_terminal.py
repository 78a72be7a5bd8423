"""Every command without its terminal: closed streams, a reader that left, a full disk under the
log. Commands that import for seconds are forks, with such streams, of a process that has imported;
training, its launchers and what starts at once are interpreters of their own, redirected by bash.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import zygote
from tests.integration.test_train import RECIPE
from tests.ranks import ROOT, environment, free_port, places, script, store

pytestmark = pytest.mark.integration
BIN = Path(sys.executable).parent
PYTHON = f'"{sys.executable}"'
LAUNCHERS = {
    "python": PYTHON,
    "torchrun": f'"{BIN}/torchrun" --standalone --nproc_per_node 2',
    "deepspeed": f'"{BIN}/deepspeed" --num_accelerators 2 --master_port {free_port()}',
}
CLOSED, FULL, LEFT = "<&- >&- 2>&-", "> /dev/full 2> /dev/full", "2> err | true"
LEFT_AND_FULL = "2> /dev/full | true"
STREAMS = {
    CLOSED: (zygote.CLOSED, zygote.CLOSED, zygote.CLOSED),
    FULL: (os.devnull, "/dev/full", "/dev/full"),
    LEFT: (os.devnull, zygote.LEFT, "err"),
}


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


def forked(folder: Path, line: str, redirected: str) -> subprocess.CompletedProcess[str]:
    """The same of one process that has imported already."""
    assert zygote.same_start(environment())
    program, *words = line.split()
    stdin, stdout, stderr = STREAMS[redirected]
    streams = (stdin, stdout, str(folder / "err") if stderr == "err" else stderr)
    (folder / "err").unlink(missing_ok=True)
    job = zygote.Job(str(ROOT / "launch" / program), words, places(1), str(folder), streams)
    [code] = zygote.ended(job).codes
    return subprocess.CompletedProcess(line, code, "", "")


def shown(folder: Path, done: subprocess.CompletedProcess[str]) -> str:
    err = folder / "err"
    return done.stdout + done.stderr + (err.read_text() if err.exists() else "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run each: whole, closed, full, left."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "tiny.yaml").write_text(RECIPE)
    store(folder)
    (folder / "s.yaml").write_text("base: tiny.yaml\ngrid: {train.seed: [0]}\n")
    for name, redirected in (("whole", ""), ("closed", CLOSED), ("full", FULL), ("left", LEFT)):
        words = ("--recipe", "tiny.yaml", "engine=replicated", f"run_dir={name}")
        if redirected:
            done = command(folder, f"train.py {' '.join(words)}", redirected)
        else:
            done = script(ROOT / "launch" / "train.py", *words, cwd=folder)
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


# (command line, its exit code where a disk cut its text)
AT_ONCE = {
    "train --dry-run": ("train.py --recipe tiny.yaml --dry-run", 2),
    "train --help": ("train.py --help", 0),
    "sweep": ("sweep.py --sweep s.yaml run_dir=whole engine=replicated", 0),
    "sweep --dry-run": ("sweep.py --sweep s.yaml --dry-run", 2),
    "submit": ("submit.py --recipe tiny.yaml --slurm cpu_test --dry-run", 2),
}
LINES = AT_ONCE | {
    "train --resume": ("train.py --recipe tiny.yaml engine=replicated run_dir=whole --resume", 0),
    "evaluate": ("evaluate.py --recipe tiny.yaml --model whole --no-pretrained", 2),
    "compare": ("compare.py whole closed --report report", 2),
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
        done = (command if name in AT_ONCE else forked)(runs, line, redirected)
        assert "Traceback" not in shown(runs, done)
        assert done.returncode == code, (redirected, shown(runs, done))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "redirected"),
    [
        ("torchrun", CLOSED),
        ("torchrun", LEFT_AND_FULL),
        *[("deepspeed", redirected) for redirected in (LEFT, CLOSED, FULL)],
    ],
)
def test_ranks_train_to_their_end(runs: Path, launcher: str, redirected: str) -> None:
    """deepspeed's launcher writes to stdout itself, so that each end of it is another; torchrun has
    words for stderr alone."""
    engine = "fsdp2" if launcher == "torchrun" else "zero"
    name = f"{launcher}-{[LEFT, CLOSED, FULL, LEFT_AND_FULL].index(redirected)}"
    line = f"train.py --recipe tiny.yaml engine={engine} run_dir={name}"
    command(runs, line, redirected, launcher)  # its own exit code and words are the launcher's
    assert (runs / name / "DONE").exists() and (runs / name / "results.json").exists()


# a launcher that is lost with its terminal: it writes more than a pipe holds before it trains
FRAGILE = """
import runpy, sys
for stream in (sys.stdout, sys.stderr):
    for _ in range(200):
        print("words " * 100, file=stream, flush=True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "redirected"), [("fragile", LEFT), ("fragile", FULL), ("deepspeed", CLOSED)]
)
def test_a_sweep_relays_its_launcher(runs: Path, launcher: str, redirected: str) -> None:
    (runs / "fragile.py").write_text(FRAGILE)
    starts = {
        "fragile": f"{sys.executable} {runs}/fragile.py",
        "deepspeed": LAUNCHERS["deepspeed"].replace('"', ""),
    }
    name = f"cell-{[LEFT, CLOSED, FULL].index(redirected)}"
    engine = "zero" if launcher == "deepspeed" else "replicated"
    line = f'sweep.py --sweep s.yaml --launcher "{starts[launcher]}" engine={engine} run_dir={name}'
    done = command(runs, line, redirected)
    assert done.returncode == 0 and "Traceback" not in shown(runs, done)
    assert (runs / name / "DONE").exists()


def test_the_launcher_that_a_sweep_relays_is_lost_without_it(runs: Path) -> None:
    (runs / "fragile.py").write_text(FRAGILE)
    (runs / "nothing.py").write_text("")
    for redirected, lost in (("> /dev/null", False), ("2> /dev/null | true", True), (FULL, True)):
        line = f"{PYTHON} fragile.py nothing.py {redirected}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], cwd=runs, capture_output=True)
        assert bool(done.returncode) == lost, redirected

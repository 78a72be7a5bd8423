"""The GPU kit in small on the CPU: all of its code but for what NCCL and CUDA do, so that its first
run on a GPU is not the first at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.ranks import ROOT, environment
from tram_ds.cli import main as tram
from tram_ds.cli import verify_gpu
from tram_ds.runtime.launchers import rank_variables
from tram_ds.verification import jobs, run
from tram_ds.verification.jobs import JobFailed
from tram_ds.verification.laws import LAWS
from tram_ds.verification.run import verify
from tram_ds.verification.steps import ORACLE, STEPS, Setting, parts

MACHINE = "tram_ds.verification.machine"
ON_A_CPU = {  # measured there, in one process
    "parity with the float64 oracle",
    "projection of epsilon in bf16",
    "self-check",
    "deterministic resume",
}


def forked(module: str, *arguments: str, world: int, timeout: float) -> Any:
    """jobs.measure in forks of a process that has imported."""
    try:
        return ranks.run(module, *arguments, world=world, timeout=timeout)
    except AssertionError as error:
        raise JobFailed(str(error)[-500:]) from error


def nothing_new(module: str, *arguments: str, world: int, timeout: float) -> Any:
    assert module == MACHINE, f"{module} {arguments} was measured again"
    return forked(module, *arguments, world=world, timeout=timeout)


def small(launch: Any = forked, **changes: Any) -> Setting:
    return Setting(1, True, launch, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole kit has run, and no law was broken."""
    out = tmp_path_factory.mktemp("kit") / "results"
    code = verify(out, [], small(), "the command")
    assert code == 0, (out / run.PAGE).read_text()
    return out


def states(page: str) -> dict[str, str]:
    """Law -> what is said of it, from the ten lines."""
    lines = [line for line in page.splitlines() if line.lstrip()[:1].isdigit()]
    told = [line.partition(". ")[2].split(": ", 1) for line in lines]
    return {law: text for law, text in told}


def test_it_says_of_ten_laws_what_a_cpu_can_and_nothing_else(done: Path) -> None:
    page = (done / run.PAGE).read_text()
    told = states(page)
    assert list(told) == [law.name for law in LAWS] and len(told) == 10
    assert {law for law, text in told.items() if text.startswith("holds")} == ON_A_CPU
    for law in set(told) - ON_A_CPU:
        assert told[law].startswith("not measured: ") and len(told[law]) > 30, law
    assert page.startswith("# Verified on CPU, 1 rank, small") and "    the command" in page


def test_what_is_there_is_not_measured_again(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.glob("*-*.json")}
    assert len(before) == len(parts(small()))
    assert verify(done, [], small(nothing_new), "again") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "    again" in (done / run.PAGE).read_text()


def test_steps_picks_and_a_result_that_is_gone_is_measured_again(
    done: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    def launch(module: str, *arguments: str, world: int, timeout: float) -> Any:
        asked.append(module)
        if module == ORACLE:
            raise JobFailed("rank 0 ended with 1: out of luck")
        return forked(module, *arguments, world=world, timeout=timeout)

    out = tmp_path / "results"
    out.mkdir()
    for path in done.glob("*.json"):
        if path.stem != "parity-zero2":
            (out / path.name).write_text(path.read_text())
    assert verify(out, ["gpt2"], small(launch), "picked") == 0
    told = states((out / run.PAGE).read_text())["parity with the float64 oracle"]
    assert told == "not measured: --steps leaves parity out; parity-zero2 left to do"
    assert asked == [MACHINE]
    for _ in range(2):  # what failed is no result
        assert verify(out, ["parity"], small(launch), "picked") == 1
        told = states((out / run.PAGE).read_text())["parity with the float64 oracle"]
        assert told == "BROKEN: parity-zero2: rank 0 ended with 1: out of luck"
    assert asked[1:] == [MACHINE, ORACLE] * 2


def test_a_broken_engine_breaks_the_law_by_name(done: Path, tmp_path: Path) -> None:
    """Engines whose pass 2 is at theta: the oracle's is not."""
    out = tmp_path / "results"
    setting = small(oracle="tests.verification.mutant_worker")
    assert verify(out, ["parity"], setting, "the command") == 1
    told = states((out / run.PAGE).read_text())["parity with the float64 oracle"]
    assert told.startswith("BROKEN: single tram_x/2: theta ")


def test_a_step_whose_time_is_over_is_left_for_the_next_start(tmp_path: Path) -> None:
    def slow(module: str, *arguments: str, world: int, timeout: float) -> Any:
        if module == MACHINE:
            return forked(module, *arguments, world=world, timeout=timeout)
        raise JobFailed("no end after 1 s", over=True)

    out = tmp_path / "results"
    assert verify(out, ["parity"], small(slow), "the command", dict.fromkeys(STEPS, 0.0)) == 75
    assert not list(out.glob("parity-*.json"))
    told = states((out / run.PAGE).read_text())["parity with the float64 oracle"]
    assert told.startswith("not measured: the time of parity is over: the same command goes on")
    # a part that has a whole step's time and does not end is broken
    assert verify(out, ["parity"], small(slow), "the command") == 1


def test_a_folder_of_another_machine_and_a_step_that_is_none_are_refused(done: Path) -> None:
    with pytest.raises(ValueError, match="its results are of ranks 1, and this is 2"):
        verify(done, [], Setting(2, True, forked), "the command")
    few = {"kind": "cuda", "gpus": 1}
    with pytest.raises(ValueError, match=r"2 ranks, and the first sees 1 GPU\(s\)"):
        verify(done, [], Setting(2, False, lambda *_, **__: few), "the command")
    assert ", ".join(STEPS) == verify_gpu.STEPS  # of its help, which imports nothing
    with pytest.raises(ValueError, match="--steps pariti: choose from parity, gpt2"):
        verify(done, ["pariti"], small(nothing_new), "the command")


def test_ranks_after_the_first_have_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in rank_variables(1, 2, "29500").items():
        monkeypatch.setenv(name, value)
    assert tram.main(["verify_gpu", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert tram.main(["verify_gpu", "--out", str(tmp_path / "out")]) == 2


def test_a_job_that_fails_says_which_rank_and_why(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"rank 0 ended with 1: .*no_such_module"):
        jobs.measure("no_such_module", world=1, timeout=60)
    (tmp_path / "stuck.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(JobFailed, match="no end after 1 s: it said nothing") as ended:
            jobs.measure("stuck", world=2, timeout=1)
    assert ended.value.over


@pytest.mark.slow
def test_two_ranks_of_a_launcher_and_one_of_them_killed(tmp_path: Path) -> None:
    """As people start it, in new interpreters: the case's jobs on two ranks, and a run that loses
    one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["launch/verify_gpu.py", "--small", "--steps", "gpt2,killed", "--out", str(tmp_path)]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    told = states(done.stdout)
    assert told["a killed rank is named"].startswith("holds: exit 6, rank, step and phase said")
    assert told["self-check"].startswith("holds")
    assert json.loads((tmp_path / "machine.json").read_text())["world"] == 2

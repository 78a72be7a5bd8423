"""Which rank a process is, from the environment of every launcher; contradictions are refused with
the command that would work."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys

import pytest

from tests import ranks
from tram_ds.runtime import launchers
from tram_ds.runtime.launchers import place, tell_launcher

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "12345",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
SHELL = {**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"} | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
BATCH = {k: v for k, v in SHELL.items() if "STEP" not in k}
HAND = {k: v for k, v in TORCHRUN.items() if k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}

FLUX = {"FLUX_JOB_SIZE": "3", "FLUX_TASK_RANK": "2", "FLUX_TASK_LOCAL_ID": "2"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.fixture(autouse=True)
def called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--recipe", "my run.yaml"])


@pytest.mark.parametrize(
    ("env", "local_rank", "expected"),
    [
        ({}, None, (0, 0, 1, "python")),
        (TORCHRUN, None, (1, 1, 2, "torchrun")),
        (HAND, None, (1, 1, 2, "torchrun")),
        (HAND, 1, (1, 1, 2, "deepspeed")),
        (SRUN, None, (3, 3, 4, "srun")),
        ({**SRUN, "SLURM_NTASKS": "8"}, None, (3, 3, 4, "srun")),  # a step smaller than the job
        (SHELL, None, (0, 0, 1, "python")),  # salloc's shell, a notebook's step
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None, (0, 0, 1, "python")),  # the login node
        ({**BATCH, "SLURM_NTASKS": "1"}, None, (0, 0, 1, "python")),
        ({**BATCH, **TORCHRUN}, None, (1, 1, 2, "torchrun")),  # torchrun in a batch script
        # one agent on each of two nodes
        (
            {**TORCHRUN, "GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "4", **SRUN}
            | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            None,
            (1, 1, 4, "torchrun"),
        ),
        # torchrun started on each node by mpirun, and MPI's variables mapped by hand
        ({**TORCHRUN, **OMPI, "GROUP_WORLD_SIZE": "2"}, None, (1, 1, 2, "torchrun")),
        ({**OMPI, **HAND}, None, (1, 1, 2, "torchrun")),
        # a user who maps SLURM's variables by hand
        (
            {**SRUN, "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}
            | {"MASTER_ADDR": "h", "MASTER_PORT": "1"},
            None,
            (3, 3, 4, "srun"),
        ),
    ],
)
def test_the_place_in_the_job(env, local_rank, expected):
    found = place(env, local_rank)
    assert (found.rank, found.local_rank, found.world_size, found.launcher) == expected


def test_srun_on_one_node_needs_no_other_variable():
    assert place(SRUN).variables == {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "22345",
    }


@pytest.mark.parametrize(
    ("env", "local_rank", "says"),
    [
        (BATCH, None, "`srun python launch/train.py --recipe 'my run.yaml'` starts 4 ranks"),
        ({**SRUN, "SLURM_NNODES": "2"}, None, "`export MASTER_ADDR=$(scontrol show hostnames"),
        ({**SRUN, "SLURM_PROCID": "4"}, None, "SLURM_PROCID=4"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "four"}, None, "SLURM_STEP_NUM_TASKS = 'four'"),
        ({**SRUN, **HAND}, None, "`unset RANK LOCAL_RANK WORLD_SIZE`"),
        ({**SRUN, **TORCHRUN}, None, "srun started 4 torchrun agents"),
        ({"WORLD_SIZE": "4"}, None, "`torchrun --nproc_per_node 4 launch/train.py"),
        ({"RANK": "0"}, None, "not WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "2"}, None, "RANK=2 of WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "-1"}, None, "RANK = '-1'"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, None, "LOCAL_RANK=1 of LOCAL_WORLD_SIZE=1"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, None, "LOCAL_WORLD_SIZE=4 of WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "0"}, None, "LOCAL_RANK=1, but RANK=0"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, None, "MASTER_PORT=70000"),
        (HAND, 0, "--local_rank=0"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, None, "`torchrun --nproc_per_node 4 launch/train.py"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, None, "PMI_SIZE"),
        ({"JSM_NAMESPACE_SIZE": "6"}, None, "`torchrun --nproc_per_node 6"),
        ({**FLUX, "PMI_SIZE": "3"}, None, "Flux started 3 processes (FLUX_JOB_SIZE)"),
        ({**FLUX, **TORCHRUN}, None, "Flux started 3 torchrun agents (FLUX_JOB_SIZE)"),
        ({**FLUX, **HAND, "WORLD_SIZE": "3"}, None, "Flux started process 2 of 3"),
        ({**SHELL, **OMPI}, None, "an MPI launcher started 2 processes"),  # mpirun within salloc
        (
            {**OMPI, **HAND, "RANK": "0", "LOCAL_RANK": "0"},
            None,
            "process 1 of 2 (OMPI_COMM_WORLD_SIZE), but RANK=0",
        ),
        (
            {**OMPI, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            None,
            "RANK=0 and WORLD_SIZE=1 were exported",
        ),
        ({"PMI_SIZE": "4", "PMI_RANK": "1", **HAND}, None, "process 1 of 4 (PMI_SIZE), but RANK=1"),
        ({**OMPI, **TORCHRUN}, None, "2 torchrun agents (OMPI_COMM_WORLD_SIZE)"),
        ({**HAND, "MASTER_ADDR": ""}, None, "not MASTER_ADDR"),
    ],
)
def test_a_contradiction_is_refused_with_the_command_that_works(env, local_rank, says):
    with pytest.raises(ValueError) as refused:
        place(env, local_rank)
    assert says in str(refused.value)
    assert "`" in str(refused.value) or "e.g." in str(refused.value)


@pytest.mark.parametrize(
    ("code", "meaning"),
    [(2, "recipe or data"), (6, "peer lost or timeout"), (75, "stopped to be requeued")],
)
def test_torchruns_last_words_are_the_line_and_the_exit_codes_meaning(
    code, meaning, tmp_path, monkeypatch
):
    """As torchrun reads and prints what its workers leave."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    tell_launcher("error: recipe r: no", code)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(file))
    last = [line for line in str(ChildFailedError("train", {0: failure})).splitlines() if line]
    assert f"error: recipe r: no (exit {code}: {meaning}" in last[-2] and set(last[-1]) == {"="}


TELL = "from tram_ds.runtime.launchers import tell_launcher; tell_launcher('error: no', 2)"


@pytest.mark.parametrize(("rank", "last"), [("0", "error: no (exit 2: recipe or data"), ("1", "")])
def test_after_what_the_deepspeed_launcher_says_comes_rank_0s_line(rank, last):
    """A shell of its name, which has a rank and then says a line, as the launcher does."""
    rank_0 = shlex.join([sys.executable, "-c", TELL])
    script = f"{rank_0}; sleep 0.2; echo exits with return code = 2 >&2"
    done = subprocess.run(
        ["sh", "-c", script, "deepspeed.launcher.launch"],
        env={**ranks.environment(), "RANK": rank},
        capture_output=True,
        text=True,
        timeout=60,
    )
    first, *rest = done.stderr.splitlines()
    assert first == "exits with return code = 2"
    assert [line[: len(last)] for line in rest] == ([last] if last else [])


@pytest.mark.slow
@pytest.mark.integration
def test_the_deepspeed_launcher_ends_with_our_line():
    command = [shutil.which("deepspeed"), "--num_accelerators", "1", "launch/train.py"]
    done = subprocess.run(
        [*command, "--recipe", "quikstart"],
        cwd=ranks.ROOT,
        env=ranks.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # as on a screen
        text=True,
        timeout=300,
    )
    *before, last = done.stdout.splitlines()
    assert done.returncode == 2
    assert last.startswith("error: 'quikstart': no such recipe") and "(exit 2: " in last
    assert any("exits with return code = 2" in line for line in before)


def test_other_launchers_are_told_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "_say_after", lambda *a: pytest.fail("no launcher's child"))
    tell_launcher("error", 2)
    assert not list(tmp_path.iterdir())

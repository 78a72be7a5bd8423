"""launch/submit.py on a real SLURM of two nodes: preemption, requeue, resume, arrays, a dead node.
See tests/slurm_cluster.py."""

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import environment
from tests.slurm_cluster import Cluster, install
from tram_ds.jobs import slurm, slurm_config

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.name for path in (ROOT / "configs" / "slurm").glob("*.yaml"))
STEPS = list(range(1, 201))
RECIPE = """
task: {name: language_modeling, data: generated, seq_len: 16, max_eval_tokens: 200}
model: {init: {architecture: gpt2, n_layer: 1, n_head: 2, n_embd: 16}}
algorithm: tram_prev
optimizer: {name: adam, lr: 1.0e-3}
engine: replicated
train: {steps: 200, global_batch: 4, micro_batch: 1, timeout: 60}
checkpoint: {every_steps: 40}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    install()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def work(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def submit(cluster, work, *arguments, slurm="cpu_test", recipe="./tiny.yaml"):
    """launch/submit.py as a user calls it, in the folder `work`; its output."""
    command = [
        sys.executable,
        str(ROOT / "launch/submit.py"),
        "--recipe",
        recipe,
        "--slurm",
        slurm,
        *arguments,
    ]
    env = environment(**cluster.env)
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ids(output):
    return re.findall(r"^job (\d+)", output, re.MULTILINE)


def until_running(cluster, work, run, steps):
    """Waits until the run has logged `steps` steps."""
    cluster.wait(
        lambda: len(steps_of(work / run)) >= steps,
        120,
        f"step {steps} of {run}; its logs:\n{logs(work)}",
    )


def until_done(cluster, work, job, state="COMPLETED", timeout=240):
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.wait(
        lambda: cluster.job(job)["JobState"] in ends,
        timeout,
        f"end of job {job}; its logs:\n{logs(work)}",
    )
    assert cluster.job(job)["JobState"] == state, logs(work)


def logs(work):
    return "\n".join(
        f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(work.rglob("slurm-*/*.log"))
    )


def steps_of(run):
    lines = (
        (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    )
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_accepts_every_template(cluster, work, template, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    assert "to start at" in slurm.test("tiny", slurm_config.load(template, ["partition=main"]))


def by_a_job_of_a_partition_that_goes_first(cluster, job):
    cluster.run(
        "sbatch",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--time=1",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )


def by_the_signal_of_the_time_limit(cluster, job):
    cluster.run("scancel", "--batch", "--signal=USR2", job)


@pytest.mark.parametrize(
    ("launcher", "preempt"),
    [
        ("srun", by_a_job_of_a_partition_that_goes_first),
        ("deepspeed", by_the_signal_of_the_time_limit),
    ],
)
def test_a_preempted_run_saves_requeues_and_finishes_as_one_mlflow_run(
    cluster, work, launcher, preempt
):
    (job,) = ids(submit(cluster, work, f"slurm.launcher={launcher}", "slurm.exclusive=true"))
    run = work / "runs" / "tiny-tram_prev-0"
    until_running(cluster, work, run, 5)
    preempt(cluster, job)
    cluster.wait(
        lambda: cluster.job(job)["Restarts"] == "1",
        60,
        f"requeue of job {job}; its logs:\n{logs(work)}",
    )
    before = (run / "run_id").read_text()
    assert sorted((run / "checkpoints").glob("step-*"))
    until_done(cluster, work, job)
    assert (run / "DONE").exists() and not (run / "REQUEUE").exists()
    assert steps_of(run) == STEPS, "a step is missing or was logged twice"
    assert (run / "run_id").read_text() == before
    with sqlite3.connect(work / "mlflow.db") as database:
        runs = database.execute(
            "select run_uuid, status from runs where name = 'tiny-tram_prev-0'"
        ).fetchall()
    assert runs == [(before.strip(), "FINISHED")]


def test_a_cancelled_run_does_not_come_back(cluster, work):
    (job,) = ids(submit(cluster, work))
    cluster.wait(lambda: "tiny-tram_prev-0 on node" in logs(work), 30, "start")
    cluster.run("scancel", job)
    until_done(cluster, work, job, "CANCELLED")
    assert cluster.job(job)["Restarts"] == "0"


def test_the_stop_reaches_training_whatever_the_set_up_ran(cluster, work):
    """Two steps before it, one of which still runs, in a task of an array."""
    setup = ["srun --ntasks=1 --overlap true", "srun --ntasks=1 --overlap sleep 300 &"]
    told = [f"slurm.setup={json.dumps(setup)}", "slurm.after.command=none", "slurm.exclusive=true"]
    (job,) = ids(submit(cluster, work, "--seeds", "0", *told))
    run = work / "runs" / "tiny-tram_prev-0"
    until_running(cluster, work, run, 5)
    steps = cluster.run("squeue", "--noheader", "--steps", f"--job={job}", "--format=%i %j")
    cluster.run("scancel", "--batch", "--signal=USR2", f"{job}_0")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", 60, f"requeue; logs:\n{logs(work)}")
    assert "stopped with a checkpoint: requeued" in logs(work), f"{steps}\n{logs(work)}"
    until_done(cluster, work, job)
    assert steps_of(run) == STEPS


def test_a_container_runtime_starts_every_rank(cluster, work):
    """A stand-in for apptainer, which takes the same words and runs what is inside."""
    tools = work / "tools"
    tools.mkdir()
    (tools / "apptainer").write_text(
        '#!/bin/bash\necho "$SLURM_PROCID $*" >> ranks.txt\n'
        'while [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"\n'
    )
    (tools / "apptainer").chmod(0o755)
    keys = [
        "slurm.container={runtime: apptainer, image: tram.sif}",
        f"slurm.setup=['export PATH={tools}:$PATH']",
        f"slurm.python={sys.executable}",
    ]
    (job,) = ids(submit(cluster, work, *keys, "train.steps=3"))
    until_done(cluster, work, job)
    ranks = sorted(line.split()[0] for line in (work / "ranks.txt").read_text().splitlines())
    assert ranks == ["0", "1"] and (work / "runs" / "tiny-tram_prev-0" / "DONE").exists()


@pytest.mark.parametrize(
    ("command", "ends", "said"),
    [
        ("srun --ntasks=1 --overlap {train}", "COMPLETED", "step 3/3"),  # a notebook's step
        ("{train}", "FAILED", "`srun --ntasks=1 python"),  # a batch script without srun
        ("srun {train}", "COMPLETED", "step 3/3"),
        ("RANK=0 WORLD_SIZE=2 srun {train}", "FAILED", "exported before it"),
    ],
)
def test_training_started_by_hand_in_an_allocation_of_two_tasks(cluster, work, command, ends, said):
    train = f"{sys.executable} {ROOT}/launch/train.py --recipe ./tiny.yaml train.steps=3"
    options = ["--parsable", "--nodes=1", "--ntasks=2", "--output=slurm-by-hand/out.log"]
    (work / "slurm-by-hand").mkdir()
    env = environment(**cluster.env, MASTER_ADDR="127.0.0.1", MASTER_PORT="29876")
    done = subprocess.run(
        ["sbatch", *options, f"--wrap={command.format(train=train)} tracking.enabled=false"],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    until_done(cluster, work, done.stdout.strip(), ends, timeout=60)
    assert said in logs(work)


def test_seeds_are_an_array_and_the_job_after_them_waits_for_all(cluster, work):
    recipe = ["train.steps=5", "slurm.ranks_per_node=1", "name=a; touch hacked"]
    after = 'slurm.after.command=\'printf "%s\\n" "$@" > after.txt\''
    array, last = ids(submit(cluster, work, "--seeds", "1-2", *recipe, after))
    until_done(cluster, work, last)
    runs = (work / "after.txt").read_text().splitlines()
    assert [Path(run).name for run in runs] == [
        "a; touch hacked-tram_prev-1",
        "a; touch hacked-tram_prev-2",
    ]
    assert all((Path(run) / "DONE").exists() for run in runs)
    assert not list(work.rglob("hacked"))
    assert "finished already" in submit(cluster, work, "--seeds", "1-2", *recipe)
    assert cluster.job(array)["JobState"] == "COMPLETED"


def test_a_job_after_a_failed_run_is_cancelled(cluster, work):
    data = "task={name: language_modeling, data: ./nowhere, seq_len: 16}"
    array, last = ids(
        submit(cluster, work, "--seeds", "1", data, "slurm.after.command=touch after.txt")
    )
    until_done(cluster, work, last, "CANCELLED")
    assert cluster.job(array)["JobState"] == "FAILED" and cluster.job(array)["Restarts"] == "0"
    assert not (work / "after.txt").exists()


def test_a_run_survives_the_death_of_a_node(cluster, work):
    (job,) = ids(submit(cluster, work, "slurm.nodes=2", "slurm.ranks_per_node=1"))
    run = work / "runs" / "tiny-tram_prev-0"
    cluster.wait(
        lambda: sorted(run.glob("checkpoints/step-*0")), 60, f"checkpoint; logs:\n{logs(work)}"
    )
    cluster.kill_node(2)
    try:
        cluster.wait(
            lambda: cluster.job(job)["JobState"] != "RUNNING",
            60,
            f"end of the attempt; logs:\n{logs(work)}",
        )
    finally:
        cluster.start_node(2)
    until_done(cluster, work, job)
    assert cluster.job(job)["Restarts"] != "0"
    assert (run / "DONE").exists()
    assert sorted(set(steps_of(run))) == STEPS

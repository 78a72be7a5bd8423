"""Submission without a SLURM: configs, cells, the job script's text, quoting, --dry-run. On a real
one: integration/."""

import itertools
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tram_ds.jobs import cells as slurm_cells
from tram_ds.jobs import slurm, slurm_config, slurm_script
from tram_ds.recipe import loading, recipe
from tram_ds.recipe.file import RecipeError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "configs" / "slurm").glob("*.yaml"))
SETS = ["train.global_batch=16", "train.micro_batch=1"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*overrides, config="cpu_test", keys=(), seeds=None, sweep=None):
    cells = slurm_cells.cells("quickstart", [*SETS, *overrides], seeds, sweep)
    return slurm.plan(cells, slurm_config.load(config, keys), array=bool(seeds or sweep))


def script(*overrides, **options):
    return planned(*overrides, **options).files[slurm.JOB]


def directives(text):
    return dict(
        line[10:].partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH ")
    )


@pytest.mark.parametrize("config", TEMPLATES)
def test_every_template_renders_to_bash(config, folder):
    text = script(config=config)
    (folder / "job.sbatch").write_text(text)
    done = subprocess.run(["bash", "-n", "job.sbatch"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nsrun " in text and "{{" not in text and "None" not in text


def test_one_task_per_gpu_and_what_a_requeue_needs():
    asked = directives(
        script(config="h100_multi_node", keys=["account=abc", "sbatch_options=[--reservation=r1]"])
    )
    assert (
        asked["nodes"] == "2"
        and asked["ntasks-per-node"] == "8"
        and asked["gpus-per-node"] == "h100:8"
    )
    assert asked["signal"] == "B:USR2@300" and asked["open-mode"] == "append"
    assert {"requeue", "exclusive"} <= set(asked)
    assert asked["account"] == "abc" and asked["reservation"] == "r1" and "partition" not in asked


@pytest.mark.parametrize("commit", ["0123abc-dirty", None])
def test_the_job_knows_the_commit_of_its_snapshot(commit, monkeypatch):
    monkeypatch.setattr(slurm_script, "git_commit", lambda: commit)
    exported = [
        line.partition("  #")[0] for line in script().splitlines() if "TRAM_DS_GIT_COMMIT" in line
    ]
    assert exported == ([f"export TRAM_DS_GIT_COMMIT={commit}"] if commit else [])


def test_nccl_settings_are_exported_and_explained():
    assert "export NCCL_SOCKET_IFNAME='^lo,docker,virbr'\n" in script(config="a100_multi_node")
    for path in (ROOT / "configs" / "slurm").glob("*.yaml"):
        lines = path.read_text().splitlines()
        for before, line in itertools.pairwise(lines):
            if re.match(r"  (# )?(TORCH_)?NCCL_\w+:", line):
                assert before.startswith("  ") and ("#" in before or "TORCH_" in line), (
                    f"{path.name}: {line} is not explained"
                )


def test_the_deepspeed_launcher_gets_one_task_with_all_cpus():
    text = script(config="deepspeed_one_node")
    assert directives(text)["ntasks-per-node"] == "1" and directives(text)["cpus-per-task"] == "96"
    assert "deepspeed.launcher.runner --num_gpus 8" in text


def test_the_port_comes_from_the_job_id_unless_it_is_given():
    assert "MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))" in script()
    assert "MASTER_PORT=31000\n" in script(keys=["master_port=31000"])


def test_hostile_names_are_inert(folder):
    """The script is run for real, with srun, scontrol and python replaced: nothing of the names may
    be executed."""
    name = "a; touch hacked $(touch hacked) `touch hacked` 'x"
    hostile = [
        "python=$(touch hacked)/python",
        "env.X='; touch hacked #'",
        "srun_options=[--mem-bind=none]",
    ]
    python = folder / "$(touch hacked)"
    python.mkdir()
    (python / "python").symlink_to(sys.executable)
    plan = planned(f"name={json.dumps(name)}", keys=hostile)
    assert (
        directives(plan.files[slurm.JOB])["job-name"]
        == "a-touch-hacked-touch-hacked-touch-hacked-x"
    )
    slurm.write(plan)
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("srun", "scontrol", "scancel"):
        (tools / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@" X="$X" >> "$LOG"\n')
        (tools / tool).chmod(0o755)
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n",
    }
    done = subprocess.run(
        ["bash", slurm.JOB], cwd=plan.folder, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "not done" in done.stdout, done.stdout + done.stderr
    called = (folder / "log").read_text()
    assert "X='; touch hacked #'\n" in called or "X=; touch hacked #\n" in called
    assert f"{plan.folder}/cells/0000.yaml\n" in called
    assert not list(folder.rglob("hacked"))


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("partition='a b'", "partition = 'a b': expected a name"),
        ('partition="a\\n#SBATCH --uid=0"', "partition"),
        ("account=-x", "account"),
        ("time=1;2", "time"),
        ("mem=lots", "mem"),
        ("constraint='a100 --uid=0'", "constraint"),
        ("sbatch_options=['--wrap=a b']", "sbatch_options.0"),
        ('env.A="x\\ny"', "env.A"),
        ("env={'A B': x}", "A B"),
        ('setup=["a\\nb"]', "setup.0"),
        ("nodes=0", "nodes = 0"),
        ("partitoin=x", "did you mean 'partition'?"),
        ("after.comand=x", "did you mean 'command'?"),
        ("signal_seconds=1800", "leaves no time to train"),
        ("ranks_per_node=null", "say how many ranks"),
        ("launcher=deepspeed", "exclusive: true"),
    ],
)
def test_a_bad_config_names_key_value_and_way_out(key, part):
    with pytest.raises(RecipeError) as refused:
        slurm_config.load("cpu_test", [key])
    assert part in str(refused.value) and "\n" not in str(refused.value)


def test_secrets_do_not_belong_into_a_job_script():
    with pytest.raises(RecipeError) as refused:
        slurm_config.load("cpu_test", ["env.HF_TOKEN=canary12345"])
    assert "canary12345" not in str(refused.value) and "export it before" in str(refused.value)


def test_a_line_break_in_a_path_is_refused(folder, monkeypatch):
    (folder / "a\nb").mkdir()
    monkeypatch.chdir(folder / "a\nb")
    with pytest.raises(RecipeError, match="line break"):
        planned()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-0:0:5", 86405),
    ],
)
def test_time_limits(time, seconds):
    assert slurm_config.seconds(time) == seconds


def test_seeds():
    assert slurm_cells.parse_seeds("1-3,3,7") == [1, 2, 3, 7]
    for wrong in ("", "3-1", "a", "1-", "-1", "1..3", "0-99999999"):
        with pytest.raises(RecipeError, match="--seeds"):
            slurm_cells.parse_seeds(wrong)


def test_an_array_has_a_cell_per_seed_and_a_job_after_it():
    plan = planned(seeds="1-20", keys=["array_limit=4", 'after.command=tool "$@"'])
    assert directives(plan.files[slurm.JOB])["array"] == "0-19%4"
    folders = [plan.files[f"cells/{index:04d}.folder"].strip() for index in range(20)]
    assert [Path(folder).name for folder in folders] == [
        f"quickstart-tram_prev-{seed}" for seed in range(1, 21)
    ]
    assert "\n  seed: 20\n" in plan.files["cells/0019.yaml"]
    assert plan.commands("77")[1][2:4] == ["--dependency=afterok:77", "--kill-on-invalid-dep=yes"]
    assert (
        'tool "$@"' in plan.files[slurm.AFTER]
        and "quickstart-tram_prev-20" in plan.files[slurm.AFTER]
    )


def test_no_job_after_an_array_if_it_is_not_wanted(folder):
    assert slurm.AFTER not in planned(seeds="1-2", keys=["after.command=none"]).files
    assert "launch/compare.py" in planned(seeds="1-2").files[slurm.AFTER]


def test_a_sweep_file_is_an_array_under_its_own_name(folder):
    (folder / "grid.yaml").write_text(
        "base: quickstart\ngrid: {algorithm: [sam, tram_prev], optimizer.lr: [1e-4, 1e-5]}\n"
    )
    cells = slurm_cells.cells(None, SETS, "1-2", "./grid.yaml")
    assert len({cell.run_dir for cell in cells}) == len(cells) == 8
    assert cells[0].run_dir.is_absolute() and {cell.recipe.optimizer.lr for cell in cells} == {
        1e-4,
        1e-5,
    }
    plan = slurm.plan(cells, slurm_config.load("cpu_test"), array=True, name="grid")
    assert directives(plan.files[slurm.JOB])["job-name"] == "grid"
    (folder / "one.yaml").write_text(plan.files["cells/0005.yaml"])
    again = loading.load("./one.yaml")
    stored = Path(plan.files["cells/0005.folder"].strip())
    assert again == cells[5].recipe and folder / again.resolved_run_dir() == stored


def test_recipe_and_seeds_take_the_place_of_the_sweeps(folder):
    (folder / "grid.yaml").write_text(
        "base: m2d2_gpt2xl\ngrid: {algorithm: [sam, asam], train.seed: [0, 1, 2]}\n"
    )
    cells = slurm_cells.cells("quickstart", SETS, "7", "./grid.yaml")
    assert [cell.run_dir.name for cell in cells] == ["quickstart-sam-7", "quickstart-asam-7"]
    with pytest.raises(RecipeError, match="nothing to submit"):
        slurm_cells.cells()


def test_seeds_that_share_a_folder_are_refused():
    with pytest.raises(RecipeError, match="share the folder"):
        slurm_cells.cells("quickstart", [*SETS, "run_dir=runs/x"], "1-2")


def test_finished_runs_are_left_out(folder):
    there = folder / "runs" / "quickstart-tram_prev-2"
    there.mkdir(parents=True)
    (there / "DONE").touch()
    (there / "recipe.yaml").write_text(
        recipe.dump(loading.load("quickstart", [*SETS, "train.seed=2"]))
    )
    plan = planned(seeds="1-3", keys=["after.command=tool"])
    assert directives(plan.files[slurm.JOB])["array"] == "0-1" and len(plan.finished) == 1
    assert "quickstart-tram_prev-2 " in plan.files[slurm.AFTER], "the job after them compares all"


def test_a_finished_run_of_another_recipe_is_neither_left_out_nor_submitted(folder):
    there = folder / "runs" / "quickstart-tram_prev-2"
    there.mkdir(parents=True)
    (there / "DONE").touch()
    (there / "recipe.yaml").write_text(
        recipe.dump(loading.load("quickstart", [*SETS, "train.seed=2", "train.steps=999"]))
    )
    with pytest.raises(RecipeError, match=r"another recipe.*train\.steps: 999 -> "):
        planned(seeds="1-3")


def test_batch_sizes_that_do_not_fit_the_ranks_are_refused():
    with pytest.raises(RecipeError, match="not divisible"):
        planned(keys=["nodes=3"])


def test_the_folder_is_private_and_holds_code_and_recipe(folder):
    plan = planned()
    slurm.write(plan)
    assert stat.S_IMODE(plan.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((plan.folder / slurm.JOB).stat().st_mode) == 0o600
    assert (plan.folder / "code/launch/train.py").is_file() and (
        plan.folder / "code/tram_ds/recipe/recipe.py"
    ).is_file()
    assert not list((plan.folder / "code").rglob("__pycache__"))
    code = [
        sys.executable,
        str(plan.folder / "code/launch/train.py"),
        "--recipe",
        str(plan.folder / "cells/0000.yaml"),
        "--dry-run",
    ]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert done.stdout == (plan.folder / "cells/0000.yaml").read_text(), (
        "the snapshot reads its recipe back unchanged"
    )


def test_dry_run_writes_nothing(folder):
    command = [
        sys.executable,
        str(ROOT / "launch/submit.py"),
        "--recipe",
        "quickstart",
        "--slurm",
        "cpu_test",
        "--dry-run",
    ]
    done = subprocess.run([*command, *SETS], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and "#SBATCH --requeue" in done.stdout
        and "sbatch --parsable" in done.stdout
    )
    assert not list(folder.iterdir())


def test_without_slurm_and_with_a_bad_recipe_it_ends_with_2(folder):
    command = [
        sys.executable,
        str(ROOT / "launch/submit.py"),
        "--recipe",
        "quickstart",
        "--slurm",
        "cpu_test",
    ]
    env = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run([*command, *SETS], capture_output=True, text=True, env=env)
    assert (
        done.returncode == 2 and "sbatch: not found" in done.stderr and "--dry-run" in done.stderr
    )
    assert not list(folder.iterdir())
    done = subprocess.run([*command, "optimizer.momentm=1"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean" in done.stderr and "Traceback" not in done.stderr

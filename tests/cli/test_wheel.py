"""An installed tool: the wheel in an environment of its own, outside the checkout, every command
from another folder. Stand-in for the network: the environment sees this one's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.ranks import ROOT, environment, free_port
from tram_ds.cli import main as tram

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def run(command: list[str | Path], folder: Path, timeout: float = 600) -> str:
    """What it prints; it must end well."""
    env = environment()
    del env["PYTHONPATH"]  # of the checkout
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from what the repository ships."""
    place = tmp_path_factory.mktemp("source")
    kept = ["tram_ds", "recipes", "configs", "launch", "pyproject.toml", "README.md", "LICENSE"]
    for name in kept:
        skipped = shutil.ignore_patterns("__pycache__")
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=skipped)
        else:
            shutil.copy(source, place / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    run([*pip, "--wheel-dir", place / "dist"], place)
    (found,) = (place / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment in which the wheel is installed."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = place / "lib" / version / "site-packages"
    with_pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install"]
    run([*with_pip, "--no-deps", "--no-index", built], place)
    # after its own packages, and without what an editable install of the checkout would add
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "else where"
    folder.mkdir()
    return folder


def test_the_wheel_ships_recipes_and_configs_and_nothing_of_the_tests(built: Path) -> None:
    names = zipfile.ZipFile(built).namelist()
    for part in ("recipes", "configs", "launch"):
        ours = {
            str(path.relative_to(ROOT))
            for path in (ROOT / part).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        inside = {n.partition("shipped/")[2] for n in names if f"/shipped/{part}/" in n}
        assert inside == ours
    assert not [name for name in names if name.startswith(("tests", "recipes", "docs"))]
    assert "tram_ds/jobs/job.sbatch.j2" in names


def test_the_code_that_runs_is_the_wheels(installed: Path, elsewhere: Path) -> None:
    code = "import tram_ds; print(tram_ds.__file__)"
    assert str(installed.parent) in run([installed / "python", "-c", code], elsewhere)


@pytest.mark.parametrize("name", tram.COMMANDS)
def test_every_command_answers(installed: Path, elsewhere: Path, name: str) -> None:
    said = run([installed / "tram", name, "--help"], elsewhere)
    assert said.startswith(f"usage: tram {name}")
    assert said == run([installed / "python", "-m", "tram_ds", name, "--help"], elsewhere)


def test_a_run_from_training_to_its_report(installed: Path, elsewhere: Path) -> None:
    """train under each launcher, evaluate, analyze, compare, sync; and those that only look."""
    bin_ = installed
    tiny = ["--recipe", "quickstart", "--smoke", "train.global_batch=4", "tracking.enabled=true"]
    run([bin_ / "tram", "train", *tiny, "algorithm=sam"], elsewhere)
    # launchers come from the other environment: started with this one's Python, as an install has
    two = [bin_ / "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run([*two, "-m", "tram_ds", "train", *tiny, "engine=fsdp2"], elsewhere)
    two = [bin_ / "python", "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    two += ["--master_port", str(free_port())]
    run([*two, "--module", "tram_ds", "train", *tiny, "train.seed=3"], elsewhere)
    folders = sorted(path.name for path in (elsewhere / "runs").iterdir())
    assert folders == [
        "smoke-quickstart-sam-0",
        "smoke-quickstart-tram_prev-0",
        "smoke-quickstart-tram_prev-3",
    ]
    assert all((elsewhere / "runs" / name / "DONE").exists() for name in folders)
    model = ["--model", f"runs/{folders[0]}", "--no-pretrained"]
    said = run([bin_ / "tram", "evaluate", "--recipe", "quickstart", "--smoke", *model], elsewhere)
    assert "zero-shot" in said
    what = ["--what", "sharpness", "--rows", "2", "algorithm=sam"]
    run([bin_ / "tram", "analyze", "--recipe", "quickstart", "--smoke", *what], elsewhere)
    run([bin_ / "tram", "compare", "runs/*", "--report", "out"], elsewhere)
    assert (elsewhere / "out" / "report.html").exists()
    said = run([bin_ / "tram", "sync", f"runs/{folders[0]}"], elsewhere)
    assert "complete" in said


def test_what_only_looks(installed: Path, elsewhere: Path) -> None:
    bin_ = installed
    said = run([bin_ / "tram", "plan", "--recipe", "m2d2_gpt2xl", "--gpus", "4"], elsewhere)
    assert "fits" in said
    said = run([bin_ / "tram", "sweep", "--sweep", "table10_gpt2xl", "--dry-run"], elsewhere)
    assert "9 cells" in said
    slurm = ["--slurm", "cpu_test", "train.micro_batch=4", "--dry-run"]
    said = run([bin_ / "tram", "submit", "--recipe", "quickstart", *slurm], elsewhere)
    assert "code/launch/train.py" in said
    doctor = [bin_ / "tram", "doctor", "--recipe", "quickstart", "model.path=null"]
    init = "model.init={architecture: gpt2, n_layer: 1, n_head: 2, n_embd: 32}"
    said = run([*doctor, init, "run_dir=runs/d"], elsewhere)
    assert "problem" not in said


def test_a_submission_snapshots_the_installed_code(installed: Path, elsewhere: Path) -> None:
    """The folder that a job of SLURM would run from, as the job would start it."""
    code = (
        "from tram_ds.jobs import cells, slurm, slurm_config\n"
        "config = slurm_config.load('cpu_test')\n"
        "plan = slurm.plan(cells.cells('quickstart'), config)\n"
        "slurm.write(plan)\nprint(plan.folder)"
    )
    folder = Path(run([installed / "python", "-c", code], elsewhere).strip())
    start = [installed / "python", folder / "code" / "launch" / "train.py", "--dry-run"]
    said = run([*start, "--recipe", folder / "cells" / "0000.yaml"], elsewhere)
    assert said == (folder / "cells" / "0000.yaml").read_text()
    assert (folder / "code" / "recipes" / "quickstart.yaml").exists()
    assert os.access(folder / "code" / "tram_ds" / "__main__.py", os.R_OK)

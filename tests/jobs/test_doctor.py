"""Each check of the doctor, made to find its problem."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.ranks import environment
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.data.bpe import VOCAB_SIZE
from tram_ds.jobs import doctor, machine_checks, slurm_config
from tram_ds.jobs.check import size
from tram_ds.planning import plan, states
from tram_ds.recipe.loading import load
from tram_ds.recipe.sections import EngineSection
from tram_ds.runtime.ranks import Job

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
task: {name: language_modeling, data: generated, seq_len: 16}
model: {init: {architecture: gpt2, n_layer: 1, n_head: 2, n_embd: 16}}
algorithm: tram_prev
optimizer: {name: adam, lr: 1.0e-3}
engine: replicated
train: {steps: 5, global_batch: 4, micro_batch: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def context(*overrides, world=1):
    return doctor.Context(
        load("./tiny.yaml", overrides), Job(0, 0, world, "python", torch.device("cpu"))
    )


def problem(check, *overrides):
    with pytest.raises(doctor.Problem) as found:
        check(context(*overrides))
    assert found.value.fix
    return found.value.found


def test_a_healthy_run_in_one_process(folder, capsys):
    assert doctor.examine(context(), skip=("smoke",))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * (len(doctor.CHECKS) - 1)
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.yaml"], "nothing is left behind"


def test_a_problem_is_said_with_its_fix_and_the_rest_is_still_checked(capsys):
    assert not doctor.examine(context("task.data=./nowhere"), skip=("smoke",))
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("problem  data")]
    assert "nowhere" in lines[at] and lines[at + 1].strip().startswith("fix: ")
    assert any(line.startswith("ok       communication") for line in lines)


def test_batch_sizes_are_checked_for_the_ranks_there_will_be():
    assert doctor.batch(context()).startswith("1 rank(s)")
    with pytest.raises(ValueError, match="not divisible"):
        doctor.batch(context(world=3))


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "cannot be written: Permission denied" in problem(doctor.run_folder)


def test_a_folder_other_nodes_do_not_see():
    other = context()
    other.job = Job(1, 0, 1, "srun", torch.device("cpu"))  # rank 0 wrote elsewhere
    with pytest.raises(doctor.Problem, match="does not see what rank 0 wrote"):
        doctor.run_folder(other)


def test_a_full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    assert "1 bytes free" in problem(doctor.disk)


def test_checkpoint_size_counts_masters_moments_and_references():
    recipe = load("./tiny.yaml")
    assert states.checkpoint_bytes(recipe, 10) == 4 * 10 * 4
    assert states.checkpoint_bytes(load("./tiny.yaml", ["algorithm=base"]), 10) == 4 * 10 * 3
    assert (
        states.checkpoint_bytes(
            load("./tiny.yaml", ["algorithm=base", "optimizer={name: sgd, lr: 1}"]), 10
        )
        == 40
    )


@pytest.mark.parametrize("row", ALGORITHMS)
def test_the_weights_a_row_remembers_are_counted_for_every_row(row: str) -> None:
    """theta_{t-1}, theta_0 or the EMA is one copy; x + z remembers nothing."""
    remembers = row.endswith(("_prev", "_init", "trpo", "mesa", "l2sp"))
    assert states.references(load("./tiny.yaml", [f"algorithm={row}"])) == remembers


def test_parameters_are_counted_without_weights():
    from tram_ds.tasks import choose as tasks

    one = context()
    assert one.parameters == sum(p.numel() for p in tasks.build(one.recipe).model().parameters())


def test_a_head_of_its_own_is_counted_where_the_model_is_a_path(tmp_path: Path) -> None:
    """A checkpoint holds it too; tied to the embedding it is none."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 50}
    counts = {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        LlamaConfig(num_hidden_layers=1, tie_word_embeddings=tied, **sizes).save_pretrained(folder)
        recipe = load("./tiny.yaml", [f"model={{path: {folder}}}"])
        counts[tied] = states.parameters(recipe, None)
    assert counts[False] - counts[True] == 50 * 8


def test_a_tracking_server_that_is_away_answers_or_hangs():
    assert "does not answer" in problem(doctor.tracking, "tracking.uri=http://127.0.0.1:9")

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "answers" in doctor.tracking(
            context(f"tracking.uri=http://127.0.0.1:{server.server_port}")
        )
        server.shutdown()
    assert doctor.tracking(context("tracking.enabled=false")) == "off"


def test_the_memory_of_a_slurm_job_is_that_of_its_ranks():
    here = context("train.global_batch=16", "train.micro_batch=1", "engine=auto")
    here.slurm = slurm_config.load("a100_multi_node")
    assert here.world == 16 and here.planned.device.type == "cuda"
    assert doctor.memory(here).startswith(
        f"{size(plan.rank_bytes(here.recipe, 16))} of states per rank on 16 rank(s)"
    )
    assert plan.rank_bytes(here.recipe, 16) < plan.rank_bytes(here.recipe, 1), "it is split"


def test_the_ranks_of_a_node_have_to_fit_its_memory(monkeypatch):
    """On a CPU everything is there; beside GPUs a model that every rank draws, and what offloading
    keeps: 4, 8 and 4 bytes per parameter of theta, Adam's moments and the gradient, theta_{t-1} and
    the snapshot."""
    each = plan.plan(context(world=2).recipe, 2).memory.total
    monkeypatch.setattr(machine_checks, "machine_memory", lambda: 2 * each)
    assert doctor.host_memory(context(world=2)).startswith(f"{size(each)} for each of a node's 2")
    monkeypatch.setattr(machine_checks, "machine_memory", lambda: 2 * each - 1)
    with pytest.raises(doctor.Problem) as found:
        doctor.host_memory(context(world=2))
    assert "micro_batch" in found.value.fix

    here = context(
        "train.global_batch=16",
        "train.micro_batch=1",
        "engine={name: fsdp2, config: offload.yaml}",
        "model.init={architecture: gpt2, n_layer: 4, n_head: 2, n_embd: 512}",
    )
    here.slurm = slurm_config.load("a100_multi_node")
    planned = plan.plan(here.recipe, 16)
    assert planned.host.offloaded == (4 + 8 + 4 + 4 + 4) * -(-planned.size.parameters // 16)
    # its share, and the largest tensor, the embedding
    drawn = -(-planned.size.parameters // 16) + VOCAB_SIZE * 512
    assert planned.host.drawn == 4 * drawn
    for mem, said in (("0", "not known"), ("64G", "of 64 GiB")):
        here.slurm = here.slurm.model_copy(update={"mem": mem})
        assert said in doctor.host_memory(here)
    here.slurm = here.slurm.model_copy(update={"mem": "10M"})
    with pytest.raises(doctor.Problem) as found:
        doctor.host_memory(here)
    assert "of 10 MiB" in found.value.found and "does not offload" in found.value.fix
    here.recipe = here.recipe.model_copy(
        update={"engine": EngineSection(name="fsdp2", config="shard.yaml")}
    )
    with pytest.raises(doctor.Problem, match="of 10 MiB") as found:
        doctor.host_memory(here)
    assert "model.path" in found.value.fix


def test_a_bad_recipe_is_the_first_line(folder):
    command = [
        sys.executable,
        str(ROOT / "launch/doctor.py"),
        "--recipe",
        "./tiny.yaml",
        "optimizer.momentm=1",
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stdout.startswith("problem  recipe")
        and "did you mean" in done.stdout
    )


@pytest.mark.slow
@pytest.mark.integration
def test_two_ranks_agree_on_everything_and_take_a_step(folder):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += [str(ROOT / "launch/doctor.py"), "--recipe", "./tiny.yaml"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "shared by 2 ranks" in done.stdout
        and "all-reduce over 2 ranks" in done.stdout
        and "one step in" in done.stdout
    )
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.yaml"]


def test_a_lock_left_by_a_dead_compilation_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py3_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert "nothing is being compiled" in doctor.builds(None)  # a lock of now is one at work
    os.utime(lock, (0, 0))
    with pytest.raises(doctor.Problem, match="minutes old") as caught:
        doctor.builds(None)
    assert str(lock) in caught.value.found and "remove" in caught.value.fix


def test_ranks_reduce_on_their_devices_in_one_order(monkeypatch):
    """The order of a set of strings differs from process to process: of two ranks, one would wait
    on the CPU and the other on the GPU."""
    asked = []

    def ones(_, device):
        asked.append(device)
        return torch.full((1,), 2.0)

    monkeypatch.setattr(doctor.torch, "ones", ones)
    monkeypatch.setattr(doctor.dist, "all_reduce", lambda _: None)
    monkeypatch.setattr(doctor.dist, "get_backend", lambda: "nccl")
    job = namedtuple("Job", "world_size device")(2, torch.device("cuda"))
    doctor.communication(namedtuple("Context", "job")(job))
    assert asked == ["cpu", "cuda"]

"""Mistakes that people make, each with the one line it is answered with and exit code 2, before
anything is read, made or waited for."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tram_ds.cli import main as tram

DRY = "train --recipe quickstart --dry-run "
MISTAKES = {
    # names of files
    "train --recipe quikstart": "no such recipe file; did you mean 'quickstart",
    "train --recipe nowhere/mine.yaml": "'nowhere/mine.yaml': no such recipe file",
    "sweep --sweep table4": "no such sweep file",
    "submit --recipe quickstart --slurm a100_onenode": "did you mean 'a100_one_node",
    "evaluate --recipe xnli_xlmr --model runs/none": "--model runs/none: there is no such folder",
    "sync runs/none": "runs/none",
    "compare runs/none": "runs/none",
    # keys and values
    DRY + "train.stpes=3": "unknown key 'stpes' in section 'train'; did you mean 'steps'?",
    DRY + "optimiser.lr=1": "unknown key 'optimiser' in the recipe; did you mean 'optimizer'?",
    DRY + "train.lr=1e-3": "did you mean optimizer.lr?",
    DRY + "seed=3": "did you mean train.seed?",
    DRY + "train.steps=many": "train.steps = 'many': expected a whole number",
    DRY + "train.steps=1.5": "train.steps = 1.5: expected a whole number",
    DRY + "train.steps=0": "train.steps = 0: expected more than 0",
    DRY + "train.steps=": "exactly one of train.steps and train.epochs is needed",
    DRY + "train.epochs=2": "exactly one of train.steps and train.epochs is needed",
    DRY + "optimizer.lr=-1": "optimizer.lr = -1: expected 0 or more",
    DRY + "optimizer.lr=nan": "expected a number",
    DRY + "optimizer.betas=0.9": "expected a list of two numbers",
    DRY + "task.eval=Art": "expected a list, e.g. [a, b]",
    DRY + "model.activation_checkpointing=yes": "expected true or false",
    DRY + "algorithm=trom_x": "did you mean 'tram_x'?",
    DRY + "algorithm=SAM": "did you mean 'sam'?",
    DRY + "algorithm.sigma=0.1": "does not read",
    DRY + "algorithm=sam algorithm.rhoo=1": "did you mean 'rho'?",
    DRY + "optimizer.name=lion": "expected one of sgd, adam, adamw",
    DRY + "optimizer=adamw": "optimizer.lr: is missing, and has no default",
    DRY + "schedule=step": "expected one of constant, linear, polynomial, cosine",
    DRY + "schedule.warmup_steps=100000": "longer than the run",
    DRY + "engine=zero4": "did you mean 'zero'?",
    DRY + "engine={name: zero, config: zero5.json}": "no such file",
    DRY + "engine={name: fsdp2, config: zero3.json}": "reads a .yaml file",
    DRY + "model.attention=flash_attention_2": "has no float32 kernels: set model.dtype=bfloat16",
    DRY + "model.path=null model.init={architecture: gpt2, auto_map: {}}": "is never run",
    DRY + "model.path=gpt2 model.init={architecture: gpt2}": "exactly one of model.path and",
    DRY + "task.name=mt": "unknown name",
    DRY + "eval.select=best eval.every_steps=null": "best needs validation runs",
    DRY + "eval.generate={prompts: []}": "at least 1 item",
    DRY + "eval.generate={prompts: [a], each_validation: true} eval.every_steps=null": "no valid",
    DRY + "eval.key=loss": "expected validation_loss, validation/DOMAIN/METRIC or",
    DRY + "metric_for_best_model=loss": "here it is eval.key",
    DRY + "train.early_stopping={patience: 0}": "patience = 0: expected more than 0",
    DRY + "train.early_stopping={}": "train.early_stopping.patience: is missing",
    DRY + "train.early_stoping={patience: 3}": "did you mean 'early_stopping'?",
    DRY + "early_stopping_patience=3": "here it is train.early_stopping.patience",
    DRY + "run_dir=out/{model}": "unknown placeholder '{model}'",
    DRY + "run_dir={recipe}/x": """if it is text, quote it twice: run_dir='"{recipe}/x"'""",
    DRY + "run_dir=$SCRATCH/x": "$SCRATCH is not expanded here",
    DRY + "tracking.uri=http://me:secret@host": "holds credentials",
    DRY + "name=a/b": "becomes part of a folder's name",
    # how it is written
    DRY + "train.steps 3": "write train.steps=3",
    DRY + "train=3": "expected a section with keys",
    DRY + "--learning_rate=1e-5": "optimizer.lr; recipe keys are written section.key=value",
    DRY + "--per_device_train_batch_size=4": "train.micro_batch",
    DRY + "'task={name: entailment'": "not valid YAML",
    # beside the recipe
    "plan --recipe quickstart --gpus 0": "--gpus 0: '0' is not a number of GPUs",
    "plan --recipe quickstart --gpus 2 --gpu v100": "--gpu v100: its peak is not known here",
    "analyze --recipe quickstart --what sharpnes": "did you mean 'sharpness'?",
    "compare --alpha 5": "--alpha 5.0: a probability is needed",
    "submit --recipe quickstart --slurm cpu_test slurm.nods=2": "did you mean 'nodes'?",
    "submit --recipe quickstart --slurm cpu_test slurm.time=long": "expected a time limit",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_in_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line) if "{" not in line or "'" in line else split_outside_braces(line)
    assert tram.main(words) == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1 and told.out == "", told
    assert MISTAKES[line] in told.err
    assert not list(tmp_path.iterdir())


def split_outside_braces(line: str) -> list[str]:
    """Words of a line in which `key={a: 1}` is one."""
    words: list[str] = []
    for word in line.split():
        if words and words[-1].count("{") > words[-1].count("}"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def test_a_key_written_as_a_flag_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    assert tram.main([*DRY.split(), "--train.seed=3"]) == 0
    assert "seed: 3" in capsys.readouterr().out


def test_there_are_as_many_as_were_tried() -> None:
    assert len(MISTAKES) >= 42

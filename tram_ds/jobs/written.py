"""What the job script writes itself: given a second time in a SLURM config, one of the two would
count in silence."""

from __future__ import annotations

from collections.abc import Sequence

from tram_ds.runtime.checked import refusal

# options that the job script writes, as the key says; given twice, SLURM takes the later in silence
WRITTEN = {
    "nodes": "nodes",
    "ntasks": "ranks_per_node",
    "ntasks-per-node": "ranks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
    "mem": "mem",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "signal": "signal_seconds",
    "array": "array_limit",
}
OF_A_STEP = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task")
# variables that the job script sets or removes after those of `env`
SET = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def refuse_written(options: Sequence[str], names: Sequence[str] = tuple(WRITTEN)) -> None:
    """Refuses those of sbatch's options that have a key, with the key."""
    for option in options:
        if (name := _name(option)) in names:
            text = f"{option}: the job script writes --{name} itself: use slurm.{WRITTEN[name]}"
            raise refusal(("", text))


def refuse_written_of_a_step(options: Sequence[str]) -> None:
    """The same of srun's options."""
    refuse_written(options, OF_A_STEP)
    if any(_name(option) == "job-name" for option in options):
        raise refusal(("", "--job-name: the request to stop finds the step by ours: leave it"))


def refuse_set(variable: str) -> None:
    """Refuses a variable of `env` that would not stay what it is there."""
    if variable in SET:
        port = " (slurm.master_port chooses the port)" if variable == "MASTER_PORT" else ""
        text = f"the job script sets it for its ranks: leave it out{port}"
        raise refusal((variable, text))


def _name(option: str) -> str:
    return option.removeprefix("--").partition("=")[0]

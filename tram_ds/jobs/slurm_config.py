"""configs/slurm/*.yaml: what to ask SLURM for. Every value is checked here, so that none can become
shell code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tram_ds.jobs.container import PYXIS_IMAGE, Container, Expanded, Line
from tram_ds.jobs.shell import check_setup, secret_in, secret_name
from tram_ds.jobs.written import refuse_set, refuse_written, refuse_written_of_a_step
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe.errors import explain
from tram_ds.recipe.file import CONFIGS, RecipeError
from tram_ds.runtime.checked import NotNegative, Positive, Section, refusal
from tram_ds.runtime.paths import expanded
from tram_ds.runtime.redact import redact

FOLDER = CONFIGS / "slurm"
# seconds: SLURM sends the --signal of a job up to that much early, and looks only every half minute
SIGNAL_LATENESS = 60
SECRET = (
    "looks like a secret, and this file and the job script are not: export it before submit.py "
    "(sbatch passes your environment on), or read it in the job, as in "
    "`export NAME=$(cat ~/.name)`"
)


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _form(pattern: str, expected: str) -> AfterValidator:
    """Text of exactly this form: it goes into an #SBATCH line or a command as it is."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise refusal(("", f"expected {expected}"))
        return value

    return AfterValidator(check)


Text = Annotated[str, BeforeValidator(_number_as_text)]
Name = Annotated[
    Text, _form(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*", "a name: letters, digits and _ . , @ + -")
]
Constraint = Annotated[
    Text,
    _form(
        r"[A-Za-z0-9_\[(][A-Za-z0-9_.,|&*()\[\]-]*",
        "node features such as a100&80gb, without spaces",
    ),
]
Memory = Annotated[
    Text, _form(r"\d+[KMGT]?", "an amount of memory such as 64G, or 0 for all of it")
]
Time = Annotated[
    Text, _form(r"(\d+-)?\d+(:\d+){0,2}", "a time limit: minutes, H:M:S or D-H, e.g. 12:00:00")
]
Option = Annotated[
    Text,
    _form(
        r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:/@%+=#-]+)?",
        "an option such as --reservation=course, without spaces",
    ),
]


class After(Section):
    """The job that starts when every cell of an array is done."""

    command: Line | None = None
    """Shell command; "$@" are the run folders. null = `python launch/compare.py "$@"`; `none` = no
    such job."""
    partition: Name | None = None
    """Partition of this job; null = the one of the training."""
    cpus: Positive = 2
    """CPU cores of this job."""
    mem: Memory | None = None
    """Memory of this job; null = the cluster's default."""
    time: Time = "30"
    """Time limit of this job."""


class Slurm(Section):
    """What one job asks SLURM for, and how it starts the ranks."""

    partition: Name | None = None
    """Queue; null = the cluster's default."""
    account: Name | None = None
    """Project the hours are charged to; null = your default."""
    qos: Name | None = None
    """Quality of service; null = your default."""
    constraint: Constraint | None = None
    """Node features, e.g. a100&80gb; null = any node."""
    nodes: Positive = 1
    """Nodes of one job."""
    gpus_per_node: NotNegative = 0
    """GPUs of each node; 0 = a CPU job."""
    gpu_type: Name | None = None
    """Type in --gpus-per-node=TYPE:N, e.g. a100; null = no type is named."""
    ranks_per_node: Positive | None = None
    """Training processes per node; null = one per GPU."""
    cpus_per_task: Positive = 1
    """CPU cores of each rank."""
    mem: Memory | None = None
    """Memory of each node, e.g. 64G; 0 = all of it; null = the cluster's default."""
    time: Time
    """Time limit of one attempt: minutes, H:M:S or D-H. The run continues after it by being
    requeued."""
    exclusive: bool = False
    """No other job on the nodes."""
    signal_seconds: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which the run is asked to save and stop: the time of a save,
    and 90 more."""
    max_restarts: NotNegative = 50
    """Requeues of one job, by whatever cause; then it fails."""
    array_limit: Positive | None = None
    """Cells of an array that may run at once; null = all."""
    launcher: Literal["srun", "deepspeed"] = "srun"
    """srun starts one task per rank; deepspeed: its launcher, on one exclusive node (it renumbers
    the GPUs itself)."""
    master_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of the rendezvous; null = 20000 + the last four digits of the job id."""
    python: Annotated[Line, AfterValidator(expanded)] | None = None
    """Python to run, one program; null = the one that runs submit.py, in a container `python3`."""
    container: Container | None = None
    """What the ranks run in; null = the node itself."""
    setup: list[Annotated[Line, AfterValidator(check_setup)]] = Field(default=[])
    """Lines of bash before the training, e.g. `module load cuda`: run as they stand, each a whole
    command; one that fails ends the job."""
    env: dict[str, Expanded] = Field(default={})
    """Environment variables of every rank, e.g. NCCL's. `$NAME` is what it is in the job."""
    sbatch_options: list[Option] = Field(default=[])
    """Further #SBATCH options, e.g. --reservation=course."""
    srun_options: list[Option] = Field(default=[])
    """Further options of srun, e.g. --cpu-bind=cores."""
    after: After = After()
    """The job that starts when every cell of an array is done."""

    @property
    def ranks(self) -> int:
        """Ranks on one node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        """Ranks of one job."""
        return self.nodes * self.ranks

    @model_validator(mode="before")
    @classmethod
    def _pyxis_by_its_option(cls, value: Any) -> Any:
        """srun_options: [--container-image=X] means container: {runtime: pyxis, image: X}."""
        options = value.get("srun_options") if isinstance(value, dict) else None
        if not isinstance(options, list) or value.get("container"):
            return value
        images = [o for o in options if isinstance(o, str) and o.startswith(PYXIS_IMAGE)]
        if len(images) != 1:
            return value
        container = {"runtime": "pyxis", "image": images[0].removeprefix(PYXIS_IMAGE)}
        left = [option for option in options if option not in images]
        return {**value, "srun_options": left, "container": container}

    @field_validator("python")
    @classmethod
    def _one_program(cls, python: str | None) -> str | None:
        if python and len(python.split()) > 1 and not Path(python).is_file():
            text = (
                "is not one program: a container goes into slurm.container (runtime and image), "
                "anything else before Python into slurm.setup or slurm.env"
            )
            raise refusal(("", text))
        return python

    @field_validator("sbatch_options")
    @classmethod
    def _outside(cls, options: list[str]) -> list[str]:
        if any(option.startswith("--container-") for option in options):
            text = (
                "would put the job script itself into the container, where SLURM's commands are "
                "not: use slurm.container"
            )
            raise refusal(("", text))
        refuse_written(options)
        return options

    @field_validator("srun_options")
    @classmethod
    def _the_step_is_ours(cls, options: list[str]) -> list[str]:
        refuse_written_of_a_step(options)
        return options

    @field_validator("env")
    @classmethod
    def _env_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise refusal((name, "is not the name of an environment variable"))
            refuse_set(name)
            if secret_name(name, value):
                raise refusal((name, SECRET))
        return env

    @model_validator(mode="after")
    def _no_secrets(self) -> Slurm:
        if problems := [
            (key, SECRET) for key, text in _texts(self.model_dump()) if secret_in(text)
        ]:
            raise refusal(*problems)
        return self

    @model_validator(mode="after")
    def _agree(self) -> Slurm:
        problems = []
        if not self.ranks:
            problems.append(("ranks_per_node", "gpus_per_node = 0: say how many ranks a node runs"))
        if self.gpu_type and not self.gpus_per_node:
            problems.append(("gpu_type", "gpus_per_node = 0: remove one of the two"))
        if self.launcher == "deepspeed" and (self.nodes > 1 or not self.exclusive):
            text = (
                "deepspeed numbers the GPUs of its node itself and needs ssh to reach others: "
                "set nodes: 1 and "
            )
            problems.append(("launcher", f"{text}exclusive: true, or launcher: srun"))
        if self.signal_seconds + SIGNAL_LATENESS >= seconds(self.time):
            text = (
                f"time = {self.time} leaves no time to train before it: a longer time, or "
                "fewer signal_seconds"
            )
            problems.append(("signal_seconds", text))
        if problems:
            raise refusal(*problems)
        return self


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the config with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _texts(item, f"{key}.{name}" if key else str(name))


def seconds(time: str) -> int:
    """A SLURM time limit in seconds: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # without days the first number of two is minutes
    hours, minutes, left = (*parts, 0, 0)[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + left


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Slurm:
    """Reads a config (a bare name stands for configs/slurm/NAME.yaml) and applies `key=value`
    overrides.

    Raises RecipeError, one line per problem.
    """
    path = recipe_file.find(name_or_path, FOLDER, "SLURM config")
    source = recipe_file.read(path, name_or_path)
    recipe_file.override(source, overrides)
    try:
        return Slurm.model_validate(source.data)
    except ValidationError as error:
        text = str(explain(error, Slurm, source)).replace("in the recipe", "in a SLURM config")
        raise RecipeError(redact(text)) from None

"""A container that the ranks of a job run in: how the runtime is called, and what of the host it
sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tram_ds.jobs.shell import check_expanded, expanded, word
from tram_ds.recipe.file import RecipeError
from tram_ds.runtime.checked import Section, refusal
from tram_ds.runtime.wording import short


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise refusal(("", "has a line break or control character in it: one line each"))
    return value


def _no_option(value: str) -> str:
    if not value or value.startswith("-"):
        raise refusal(("", "begins like an option: further options go into container.options"))
    return value


def _an_option(value: str) -> str:
    if not re.match(r"--?[A-Za-z]", value):
        raise refusal(("", "expected an option such as --cleanenv, one an entry"))
    return value


Line = Annotated[str, AfterValidator(_one_line)]
Expanded = Annotated[Line, AfterValidator(check_expanded)]
Place = Annotated[Expanded, AfterValidator(_no_option)]
Flag = Annotated[Expanded, AfterValidator(_an_option)]

PYXIS_IMAGE = "--container-image="
# registry.example/name, which pyxis takes for a name on Docker Hub
_DOCKER_FORM = re.compile(r"(docker://)?(?P<registry>[\w-]+(\.[\w-]+)+(:\d+)?)/(?P<rest>[^#]+)")


class Container(Section):
    """The container of the ranks. The job script runs outside, where SLURM's commands are."""

    runtime: Literal["apptainer", "singularity", "pyxis"]
    """apptainer (or singularity) is called for each rank; pyxis is the plugin of srun."""
    image: Place
    """A file, or what the runtime pulls: docker://nvcr.io/nvidia/pytorch:25.01-py3 (apptainer),
    nvcr.io#nvidia/pytorch:25.01-py3 (pyxis)."""
    mounts: list[Place] = Field(default=[])
    """Further folders of the host, PATH or PATH:PATH[:ro]: data, caches. The folder submit.py runs
    in and that of the runs are there without being named."""
    options: list[Flag] = Field(default=[])
    """Further options of the runtime, e.g. --containall (apptainer), --no-container-mount-home
    (pyxis)."""

    @model_validator(mode="after")
    def _pyxis_writes_a_registry_with_a_hash(self) -> Container:
        found = _DOCKER_FORM.fullmatch(self.image)
        if self.runtime == "pyxis" and found:
            right = f"{found[1] or ''}{found['registry']}#{found['rest']}"
            raise refusal(("image", f"pyxis writes the registry with a #: {right}"))
        if self.runtime == "pyxis" and self.image.endswith(".sqsh") and self.image[0] not in "/.$":
            text = f"pyxis takes that for a name on Docker Hub: a file is ./{self.image}"
            raise refusal(("image", text))
        return self

    def inside(self, gpus: bool, folders: Sequence[Path]) -> list[str]:
        """Words of bash before the command of a rank; none for pyxis."""
        if self.runtime == "pyxis":
            return []
        nvidia = ["--nv"] if gpus else []
        mounts = [f"--bind={mount}" for mount in self._mounts(folders)]
        options = [expanded(option) for option in self.options]
        return [self.runtime, "exec", *nvidia, *mounts, *options, expanded(self.image)]

    def srun_options(self, folders: Sequence[Path], variables: Sequence[str]) -> list[str]:
        """Words of bash among srun's options; none for apptainer.

        variables: names that are the job's inside too, whatever the image sets.
        """
        if self.runtime != "pyxis":
            return []
        return [
            f"--container-image={expanded(self.image)}",
            *(f"--container-mounts={mount}" for mount in self._mounts(folders)),
            '--container-workdir="$PWD"',
            f'--container-env="{",".join(variables)}"',
            *map(expanded, self.options),
        ]

    def _mounts(self, folders: Sequence[Path]) -> list[str]:
        """Of the host, each once: `folders` under their own names, then those of the config."""
        outer = [f for f in folders if not any(o in f.parents for o in folders)]
        for folder in outer:
            if ":" in str(folder) or "," in str(folder):
                raise RecipeError(
                    f"{short(str(folder))}: a container mounts no folder with `:` or `,` in its "
                    "name: rename it, or reach it through a link of another name"
                )
        own = [word(f"{folder}:{folder}") for folder in dict.fromkeys(outer)]
        given = [mount if ":" in mount else f"{mount}:{mount}" for mount in self.mounts]
        return [*own, *map(expanded, given)]

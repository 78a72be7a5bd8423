"""What a checkpoint says of the run that wrote it, read back: checked before it is believed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tram_ds.runtime.peers import Peers


class Optimizer(BaseModel):
    """As same_run.made() has it."""

    model_config = ConfigDict(strict=True)

    name: str
    groups: list[dict[str, Any]]


class Record(BaseModel):
    """As saved.told() wrote it. What the version that did had not yet has a default, and is unset
    (model_fields_set)."""

    model_config = ConfigDict(strict=True)

    algorithm: str
    seed: int = 0
    options: dict[str, Any] = {}
    clip_norm: float | None = None
    optimizer: Optimizer = Optimizer(name="", groups=[])
    step: int = Field(ge=0)
    base_steps: int = Field(ge=0)
    radius: list[float] | None = None


def record(told: Any, where: str) -> Record:
    """ValueError, one line, where `told` is not what saved.told() writes. where: it was read."""
    if told is None:
        raise unreadable(where, "it does not say of which step of TRAM it is")
    try:
        return Record.model_validate_json(told)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        why = f"{key}: {first['msg']}" if key else first["msg"]
        raise unreadable(where, f"what it says of its run is damaged, {why}") from error


def refuse_unlike(mine: tuple[int, int], where: str, world_size: int) -> None:
    """ValueError, on every rank, where files of two ranks are of other steps: a save that was cut
    short, over the files of an earlier one. mine: step and base_steps. Collective."""
    peers = Peers(world_size)
    try:
        every = peers.gather((mine, where))
    finally:
        peers.close()
    for rank, (steps, file) in enumerate(every):
        if steps != every[0][0]:
            raise ValueError(
                f"{every[0][1]} is of step {every[0][0][0]} for rank 0, and {file} of step "
                f"{steps[0]} for rank {rank}: resume from an earlier checkpoint of the run"
            )


def unreadable(where: str, why: str) -> ValueError:
    """The line for what is there and cannot be continued from."""
    return ValueError(
        f"{where} cannot be read ({why}): resume from an earlier checkpoint of the run"
    )

"""The table: an algorithm is a row of parts, and what it reads is what its parts have. No class,
no copied loop. Imports no torch, so a recipe is checked, and refused, at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

from tram_ds.algorithms import options as parts
from tram_ds.algorithms.options import Part, When
from tram_ds.runtime.checked import NamedSection, Section, chosen, problems, refusal
from tram_ds.runtime.wording import short

CLIMB = (parts.SecondMasks, parts.Climb)
ASAM = (*CLIMB, parts.Adaptive, parts.Constant)
TRAM = (*ASAM, parts.Region, parts.Radius)
PENALTY = (parts.Region, parts.Penalty)

# the paper's names; its SGD and Adam rows are `base` with that optimizer
ALGORITHMS: dict[str, tuple[type[Part], ...]] = {
    "base": (),
    "sam": (*CLIMB, parts.Gradient, parts.Constant),
    "asam": ASAM,
    "fsam": (*CLIMB, parts.Fisher, parts.Constant),
    # not the paper's
    "functional_sam": (parts.Climb, parts.Gradient, parts.Constant, parts.StoredGradient),
    "trpo": (*PENALTY, parts.Previous),
    "r3f": (*PENALTY, parts.Noised, parts.BothBranches),
    "mesa": (*PENALTY, parts.Average),
    "kl_init": (*PENALTY, parts.Initial),  # not the paper's: fine-tuning's usual KL term
    "l2sp": (parts.Pull,),  # not the paper's, as what else stays near theta_0
    "msam": (parts.Momentum, parts.Constant),  # nor is what moves the weights at no further pass
    "rwp": (parts.WeightNoise,),
    "asam_trpo": (*ASAM, *PENALTY, parts.BesideAscent, parts.Previous),
    "asam_r3f": (*ASAM, *PENALTY, parts.BesideAscent, parts.Noised, parts.BothBranches),
    "asam_mesa": (*ASAM, *PENALTY, parts.BesideAscent, parts.Average),
    "tram_prev": (*TRAM, parts.Previous),
    "tram_init": (*TRAM, parts.Initial),
    "tram_x": (*TRAM, parts.Noised, parts.NoisedDescent),
    "tram_fisher": (*CLIMB, parts.Fisher, parts.Constant, parts.Noised, parts.FisherOnNoise),
}
# every option once, in the order of the table
OPTIONS: dict[str, FieldInfo] = {
    key: field
    for row in ALGORITHMS.values()
    for part in row
    for key, field in part.model_fields.items()
}


def reads(row: str) -> set[str]:
    """The options of a row: those of its parts."""
    return {key for part in ALGORITHMS[row] for key in part.model_fields}


def readers(option: str) -> list[str]:
    """The rows that read an option."""
    return [name for name in ALGORITHMS if option in reads(name)]


def unread(row: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Option -> why nothing reads it: the row has no part with it, or another option's value leaves
    it out. values: of every option."""
    found, read = {}, reads(row)
    for key, field in OPTIONS.items():
        if key not in read:
            found[key] = (
                f"algorithm.name = {row} does not read algorithm.{key} (read by "
                f"{', '.join(sorted(readers(key)))})"
            )
        for when in field.metadata:
            if key in read and isinstance(when, When) and (text := _unmet(when, values, read)):
                found[key] = f"{text[0]} does not read algorithm.{key} (read by {text[1]})"
    return found


def _unmet(when: When, values: Mapping[str, Any], read: set[str]) -> tuple[str, str] | None:
    """(what stands there, what would have to) where no condition holds; None where one does, or the
    row reads none of the options."""
    asked = {option: wanted for option, wanted in when.any_of.items() if option in read}
    if not asked or any(values[option] in wanted for option, wanted in asked.items()):
        return None
    one = len(asked) == 1
    return (
        " with ".join(f"algorithm.{option} = {values[option]}" for option in asked),
        " or ".join(
            ", ".join(wanted) if one else f"algorithm.{option} = {', '.join(wanted)}"
            for option, wanted in asked.items()
        ),
    )


_NAME = "A row of ALGORITHMS; base is the optimizer alone (the paper's SGD and Adam rows)."
_FIELDS: dict[str, Any] = {
    "name": Annotated[str, Field(description=_NAME)],
    **{key: (field.annotation, field) for key, field in OPTIONS.items()},
}
_Options: Any = create_model("_Options", __base__=NamedSection, **_FIELDS)


class AlgorithmSection(_Options):
    """The training algorithm: a row of ALGORITHMS and its options. An option its row does not read
    is refused."""

    def unread(self) -> dict[str, str]:
        return unread(self.name, {key: getattr(self, key) for key in OPTIONS})

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return chosen(value, ALGORITHMS)

    @model_validator(mode="after")
    def _agrees(self) -> AlgorithmSection:
        if found := list(parts.disagreements(self)):
            raise refusal(*found)
        return self


class _Asked(Section):
    """What somebody's own loop asks for, named as in a recipe."""

    algorithm: AlgorithmSection


def asked(algorithm: str | Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A name, or a name and its options, with further options: one mapping. ValueError."""
    given = {"name": algorithm} if isinstance(algorithm, str) else algorithm
    if not isinstance(given, Mapping):
        raise ValueError(
            f"algorithm = {short(algorithm)}: expected a name, or a name and its options, such as "
            "{'name': 'tram_x', 'sigma': 0.1}"
        )
    if twice := [key for key in options if key in given]:
        raise ValueError(
            f"algorithm.{twice[0]} = {short(options[twice[0]])}: is given twice, the other time in "
            f"algorithm = {short(algorithm)}: remove one"
        )
    return {**given, **options}


def checked(given: Mapping[str, Any]) -> AlgorithmSection:
    """The section that a recipe would have. ValueError with its line for each problem."""
    data = {"algorithm": dict(given)}
    try:
        return _Asked.model_validate(data).algorithm
    except ValidationError as error:
        lines = dict.fromkeys(line for _, line in problems(error, _Asked, data))
        raise ValueError("\n".join(lines)) from None

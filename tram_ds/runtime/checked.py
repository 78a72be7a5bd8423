"""Settings that are right or refused by name: strict, frozen models, one line for each problem."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tram_ds.runtime.wording import hint, short

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]
AtLeast = Annotated[float, Field(ge=0)]

STRICT = ConfigDict(
    extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)
EXPECTED = {  # pydantic's error type -> what was expected
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": "expected text (put quotes around it)",
    "list_type": "expected a list, e.g. [a, b]",
    "tuple_type": "expected a list of two numbers, e.g. [0.9, 0.99]",
    "dict_type": "expected keys and values",
    "model_type": "expected a section with keys",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected {ge:g} or more",
    "less_than": "expected less than {lt:g}",
    "less_than_equal": "expected {le:g} or less",
}


class Section(BaseModel):
    """Strict and frozen: unknown keys, text where a number belongs, NaN and infinity are
    refused."""

    model_config = STRICT

    def given(self) -> list[str]:
        """Keys somebody set to something."""
        keys = [key for key in type(self).model_fields if key in self.model_fields_set]
        return [key for key in keys if getattr(self, key) is not None]

    def unread(self) -> dict[str, str]:
        """key -> why nothing reads it, given the values of this section's other keys."""
        return {}

    @model_validator(mode="after")
    def _refuse_unread(self) -> Any:
        unread = self.unread()
        if problems := [(key, unread[key]) for key in self.given() if key in unread]:
            raise refusal(*problems)
        return self


class NamedSection(Section):
    """A section that may be written as its name alone: `algorithm: sam` means `algorithm: {name:
    sam}`."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def refusal(*problems: tuple[str, str]) -> PydanticCustomError:
    """An error for values that do not go together: (key or "" for this one, what is wrong and the
    way out) for each."""
    text = "; ".join(text for _, text in problems)
    return PydanticCustomError("refused", "{text}", {"problems": problems, "text": text})


def chosen(value: str, known: Iterable[str]) -> str:
    """`value` if it is known; else an error that lists what is, nearest first."""
    known = list(known)
    if value not in known:
        raise refusal(("", f"unknown name{hint(value, known)} (one of {', '.join(known)})"))
    return value


def problems(
    error: ValidationError,
    model: type[BaseModel],
    data: Any,
    *,
    never: Mapping[str, str] | None = None,
    theirs: Mapping[str, Mapping[str, str]] | None = None,
    hidden: Iterable[str] = (),
) -> Iterator[tuple[str, str]]:
    """(dotted path, `path = value: what is wrong`) of each problem, in the order of the sections.

    data: what was validated. never: keys that no section can have -> why. theirs: path -> what
    other libraries call a value, in lower case -> ours. hidden: paths whose values are not
    shown.
    """
    sections = keys_of(model)
    found = [(_place(problem, data), problem) for problem in error.errors(include_url=False)]
    for path, same in groupby(found, key=itemgetter(0)):
        alternatives = [problem for _, problem in same]  # of a union, each says what it expects
        problem = alternatives[0]
        texts = [_text(one, path, sections, never or {}) for one in alternatives]
        later = (text.removeprefix("expected ") for text in texts[1:])
        for key, text in problem.get("ctx", {}).get("problems") or [
            ("", " or ".join(dict.fromkeys([texts[0], *later])))
        ]:
            full = ".".join([*path, key] if key else path)
            value = _value(data, full)
            if ours := (theirs or {}).get(full, {}).get(str(value).lower()):
                text = f"{text.partition(';')[0]}; here it is {ours}"
            silent = problem["type"] == "missing" or (key and value is None) or full in hidden
            shown = "" if silent or isinstance(value, dict) else f" = {short(value)}"
            yield full, f"{full}{shown}: {text}"


def keys_of(model: type[BaseModel]) -> dict[str, list[str]]:
    """Section, dotted where it is inside another -> its keys; the model's own keys are under the
    empty name."""
    sections: dict[str, list[str]] = {"": list(model.model_fields)}
    for name, kind in inner_models(model).items():
        sections |= {f"{name}.{key}".rstrip("."): found for key, found in keys_of(kind).items()}
    return sections


def inner_models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Key -> the section there, also where it may be null."""
    return {
        name: kind
        for name, field in model.model_fields.items()
        for kind in (field.annotation, *get_args(field.annotation))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def _place(problem: Any, data: Any) -> list[str]:
    """The keys down to the value: pydantic goes on with the member of a union that was tried."""
    path, value = [str(part) for part in problem["loc"]], data
    if problem["type"] == "missing":
        return path  # also of a section that is written as its name
    for depth, part in enumerate(path):
        if not isinstance(value, dict | list) and part != "name":
            return path[:depth]
        value = _value(value, part)
    return path


def _text(
    problem: Any, path: list[str], sections: dict[str, list[str]], never: Mapping[str, str]
) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        key = path[-1]
        return never[key] if key in never else _unknown_key(key, ".".join(path[:-1]), sections)
    if kind == "missing":
        return "is missing, and has no default"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"expected one of {', '.join(choices)}{hint(problem['input'], choices)}"
    if kind in EXPECTED:
        return EXPECTED[kind].format(**context)
    return " ".join(problem["msg"].split())


def _unknown_key(key: str, section: str, sections: dict[str, list[str]]) -> str:
    place = f"section '{section}'" if section else "the recipe"
    text = f"unknown key '{key}' in {place}"
    near = hint(key, sections.get(section, []))
    others = {name: keys for name, keys in sections.items() if name != section and key != "name"}
    homes = [f"{name}.{key}".lstrip(".") for name, keys in others.items() if key in keys]
    if homes:
        return f"{text}; did you mean {' or '.join(homes)}?"
    if near:
        return text + near
    return text + (_elsewhere(key, sections) or f" (it has {', '.join(sections.get(section, []))})")


def _elsewhere(key: str, sections: dict[str, list[str]]) -> str:
    """A near key of another section, with that section."""
    homes = {other: f"{name}.{other}" for name, keys in sections.items() if name for other in keys}
    near = re.search(r"'(.*)'", hint(key, homes, 0.8))
    return f"; did you mean '{homes[near[1]]}'?" if near else ""


def _value(data: Any, path: str) -> Any:
    value = data
    for part in path.split("."):
        if isinstance(value, str) and part == "name":  # a section written as its name
            return value
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            return None
    return value

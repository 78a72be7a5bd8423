"""Turns pydantic's report into lines a user can act on: where, which key and value, what is
allowed, did you mean."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tram_ds.recipe.file import RecipeError, Source, hint, short
from tram_ds.recipe.sections import REMOTE_CODE

_EXPECTED = {  # pydantic's error type -> what was expected
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
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected {ge} or more",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected {le} or less",
}


def explain(error: ValidationError, model: type[BaseModel], source: Source) -> RecipeError:
    """One line per problem, in the order of the sections."""
    sections = keys_of(model)
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"]]
        for key, text in problem.get("ctx", {}).get("problems") or [
            ("", _text(problem, path, sections))
        ]:
            full = ".".join([*path, key] if key else path)
            missing = problem["type"] == "missing" or (key and _value(source, full) is None)
            shown = "" if missing or full == "tracking.uri" else _shown(_value(source, full))
            lines.append(f"{source.where(full)}: {full}{shown}: {text}")
    return RecipeError("\n".join(dict.fromkeys(lines)))


def keys_of(model: type[BaseModel]) -> dict[str, list[str]]:
    """Section -> its keys; the recipe's own keys are under the empty name."""
    sections: dict[str, list[str]] = {"": list(model.model_fields)}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or null
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                sections[name] = list(kind.model_fields)
    return sections


def _text(problem: Any, path: list[str], sections: dict[str, list[str]]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path[-1], ".".join(path[:-1]), sections)
    if kind == "missing":
        return "is missing, and has no default"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"expected one of {', '.join(choices)}{hint(problem['input'], choices)}"
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**context)
    return " ".join(problem["msg"].split())


def _unknown_key(key: str, section: str, sections: dict[str, list[str]]) -> str:
    if key == "trust_remote_code":
        return REMOTE_CODE
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
    near = re.search(r"'(.*)'", hint(key, homes))
    return f"; did you mean '{homes[near[1]]}'?" if near else ""


def _value(source: Source, path: str) -> Any:
    value: Any = source.data
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


def _shown(value: Any) -> str:
    return "" if isinstance(value, dict) else f" = {short(value)}"

"""`python -m tram_ds.recipe.docs` writes recipes/README.md and recipes/recipe.schema.json from the
recipe models; with the name of an algorithm it prints the options of that row instead."""

from __future__ import annotations

import html
import json
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tram_ds.algorithms.table import ALGORITHMS, OPTIONS, AlgorithmSection, readers
from tram_ds.recipe import aliases
from tram_ds.recipe.file import RECIPES
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.checked import NamedSection, inner_models

INTRO = """# Recipes

One YAML file is one run: what differs from the defaults below, and line 1 is its launch command.
The same script runs under `deepspeed`, `torchrun`, `srun` and plain `python`:

    deepspeed launch/train.py --recipe NAME-OR-PATH [section.key=value ...]
        [--smoke] [--dry-run] [--resume]

A bare name stands for a file of this folder. Values of overrides are YAML: `algorithm=asam`,
`train.clip_norm=null`, `task.eval=[Art, Philosophy]`. A section that has a `name` may be written as
that name alone (`algorithm: sam`); setting it so on the command line replaces the whole section.
`--dry-run` prints the resolved recipe. `--smoke` trains a two-layer random model of the same
architecture for 3 steps on data that is on every machine. Only `true` and `false` are truth values,
and `1e-5` is a number.

Editors that know the YAML language server complete and check the files by `recipe.schema.json`.
This page is generated: `python -m tram_ds.recipe.docs` writes it and the schema from the docstrings
of the code.
"""

ALIASES = """What Hugging Face's Trainer, DeepSpeed, axolotl, torchtune and TRL call it. These names
are refused with the line below, never translated in silence.
"""

SWEEPS = """A sweep file names one or more recipes (`base`) and a `grid`: recipe key, dotted, and
the list of its values. Every combination is a run in its own folder; finished ones are skipped, so
the same command goes on where it was stopped. `also` is a list of further grids with keys of their
own. `--hours h100` says first what the cells to run will cost.
"""


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, with the short form of named sections."""
    document = Recipe.model_json_schema(mode="validation")
    _unwrap_descriptions(document)
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}
    document["required"].remove("name")  # the file's stem
    definitions = document["$defs"]
    definitions["AlgorithmSection"]["properties"]["name"]["enum"] = list(ALGORITHMS)
    for key, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, NamedSection):
            whole = document["properties"][key]
            reference = {"$ref": whole.pop("$ref")}
            name = definitions[section.__name__]["properties"]["name"]
            short = {"type": "string", **({"enum": name["enum"]} if "enum" in name else {})}
            document["properties"][key] = {**whole, "anyOf": [reference, short]}
    return document


def reference_markdown() -> str:
    """recipes/README.md: the shipped recipes, and every key once with its type, default and
    meaning."""
    parts = [INTRO, "## Files\n", "| recipe | launch |", "|---|---|"]
    for path in sorted(RECIPES.glob("*.yaml")):
        launch = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        parts.append(f"| [{path.name}]({path.name}) | `{launch}` |")
    parts += ["\n## Sweeps\n", SWEEPS, "| sweep | what | launch |", "|---|---|---|"]
    for path in sorted((RECIPES / "sweeps").glob("*.yaml")):
        launch, what, *_ = (
            line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()
        )
        parts.append(f"| [{path.name}](sweeps/{path.name}) | {what} | `{launch}` |")
    definitions = schema()["$defs"]
    for key, section in inner_models(Recipe).items():
        within = {f"{key}.{name}": inner for name, inner in inner_models(section).items()}
        for path, one in {key: section, **within}.items():
            readers = read_by if one is AlgorithmSection else None
            parts += [
                f"\n## {path}\n",
                f"{_line(one.__doc__)}\n",
                *_table(one, definitions[one.__name__], readers),
            ]
    own = {key: field for key, field in Recipe.model_fields.items() if field.annotation is str}
    parts += ["\n## Top level\n", "| key | type | default | meaning |", "|---|---|---|---|"]
    parts += [_row(key, "text", field, "the file's stem") for key, field in own.items()]
    parts += ["\n## Yours and ours\n", ALIASES, aliases.table()]
    return "\n".join(parts)


def main() -> None:
    """Writes both files; with the name of an algorithm, prints what can be set of it instead."""
    if len(sys.argv) > 1:
        print(help_of(sys.argv[1]))
        return
    for name, text in files().items():
        (RECIPES / name).write_text(text, encoding="utf-8")
        print(f"wrote recipes/{name}")


def files() -> dict[str, str]:
    """File name in recipes/ -> the content it should have."""
    return {
        "README.md": reference_markdown(),
        "recipe.schema.json": json.dumps(schema(), indent=1, ensure_ascii=False) + "\n",
    }


def read_by(key: str) -> str:
    """The rows of ALGORITHMS that read an option, in words."""
    found = readers(key) if key in OPTIONS else list(ALGORITHMS)
    if len(found) == len(ALGORITHMS):
        return "all"
    others = [name for name in ALGORITHMS if name not in found]
    return f"all but {', '.join(others)}" if len(others) < 4 else ", ".join(found)


def help_of(row: str) -> str:
    """What can be set of one algorithm: a line for each option that the row reads."""
    definition = schema()["$defs"]["AlgorithmSection"]["properties"]
    lines = [f"algorithm.name = {row} reads:"]
    for key, field in OPTIONS.items():
        if row in readers(key):
            kind = html.unescape(_kind(definition[key]))
            meaning = textwrap.wrap(f"{kind}. {_line(field.description)}", 90)
            lines.append(f"  algorithm.{key}={json.dumps(field.default)}")
            lines += [f"      {line}" for line in meaning]
    return "\n".join(lines)


def _table(
    section: type[BaseModel], definition: dict[str, Any], readers: Callable[[str], str] | None
) -> list[str]:
    rows = [
        _row(key, _kind(definition["properties"][key]), field)
        + (f" {readers(key)} |" if readers else "")
        for key, field in section.model_fields.items()
    ]
    more = (" read by |", "---|") if readers else ("", "")
    return [f"| key | type | default | meaning |{more[0]}", f"|---|---|---|---|{more[1]}", *rows]


def _row(key: str, kind: str, field: Any, computed: str = "required") -> str:
    default = computed if field.default is PydanticUndefined else f"`{json.dumps(field.default)}`"
    meaning = re.sub(r"([|<>])", r"\\\1", _line(field.description))
    return f"| `{key}` | {kind} | {default} | {meaning} |"


def _kind(schema: dict[str, Any]) -> str:
    """A JSON Schema in words."""
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "$ref" in schema:
        return "keys and values, below"
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "[number, number]"
    kinds = {
        "string": "text",
        "integer": "whole number",
        "object": "keys and values",
        "boolean": "true, false",
    }
    signs = {
        "exclusiveMinimum": "&gt;",
        "minimum": "&ge;",
        "exclusiveMaximum": "&lt;",
        "maximum": "&le;",
    }
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return f"{kinds.get(schema['type'], schema['type'])} {', '.join(limits)}".strip()


def _unwrap_descriptions(node: Any) -> None:
    for inner in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _unwrap_descriptions(inner)
    if isinstance(node, dict) and isinstance(node.get("description"), str):
        node["description"] = _line(node["description"])


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    main()

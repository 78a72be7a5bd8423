"""Reading and writing recipe files: strict YAML, dotted overrides, where each key came from. Knows
no key by name."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tram_ds.runtime.paths import expanded
from tram_ds.runtime.wording import hint, short

PACKAGE = Path(str(files("tram_ds"))).resolve()
ROOT = PACKAGE.parent  # of a checkout
# what stands beside the package in a checkout, and within it where it was installed
SHIPPED = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else ROOT
RECIPES = SHIPPED / "recipes"
CONFIGS = SHIPPED / "configs"
LAUNCH = SHIPPED / "launch"

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null")}
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


_KEY = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*")


class RecipeError(ValueError):
    """A recipe, override or engine config that cannot be used; one line per problem. Scripts print
    it and exit 2."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-5 is a number, yes / no / on / off and dates are text, 010 is ten."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as something else."""


# tag, pattern, first characters; the first match wins
_RESOLVERS: list[tuple[str, re.Pattern[str], str]] = [
    # \0 is for no character at all: PyYAML keeps the resolvers of empty text under ""
    ("null", re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", re.compile(r"[-+]?[0-9]+"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
]
# emptied, because PyYAML's are YAML 1.1's: 1e-5 is text there, and `no` is false. _Dumper has them
# beside ours, and so quotes whatever either reader would take for something else
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _RESOLVERS:
    # PyYAML asks match(), which a beginning would satisfy
    _exact = re.compile(f"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(
        _TAG + _name, _exact, [character.replace("\0", "") for character in _first]
    )
    _Dumper.add_implicit_resolver(
        _TAG + _name, _exact, [character.replace("\0", "") for character in _first]
    )


def _construct_int(loader: _Loader, node: Node) -> int:
    return int(str(node.value))


# SafeLoader's own reads 010 as eight
_Loader.add_constructor(_TAG + "int", _construct_int)


@dataclass
class Source:
    """A file's content, and for error messages the line of every key and which keys the command
    line set."""

    file: str
    data: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)  # dotted path -> line number
    overridden: set[str] = field(default_factory=set)  # dotted paths

    def where(self, path: str) -> str:
        """`command line`, `file:line` or `file`: the place that set the key with this dotted
        path."""
        if any(path == key or path.startswith(key + ".") for key in self.overridden):
            return "command line"
        if path in self.lines:
            return f"{self.file}:{self.lines[path]}"
        return (
            "command line"
            if any(key.startswith(path + ".") for key in self.overridden)
            else self.file
        )


def find(
    given: str, folder: Path = RECIPES, what: str = "recipe file", ends: str = ".yaml"
) -> Path:
    """The file that a user means: a bare name is looked for in `folder` first, then where one
    stands; anything else is a path. Its ending may be left out.

    RecipeError, which lists what `folder` has. what: what messages call such a file.
    """
    given = expanded(given, what)
    for place in [Path()] if os.sep in given else [folder, Path()]:
        for path in (place / given, place / f"{given}{ends}"):
            if path.is_file():
                return path
    there = sorted(path.name for path in folder.glob(f"*{ends}"))
    near = hint(given, [*there, *(Path(name).stem for name in there)])
    shown = folder.relative_to(RECIPES.parent)
    raise RecipeError(
        f"{short(given)}: no such {what}{near}; {shown} has {', '.join(there) or 'none'}"
    )


def read(path: Path, file: str | None = None) -> Source:
    """Parses a YAML mapping; `file` is how messages call it."""
    file = file or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise RecipeError(f"{file}: cannot be read: {reason}") from None
    lines: dict[str, int] = {}
    data = _parse(text, file, lines)
    if not isinstance(data, dict):
        raise RecipeError(
            f"{file}: expected sections such as task: and model:, found {short(data)}"
        )
    return Source(file, data, lines)


def override(source: Source, overrides: Sequence[str]) -> None:
    """Sets `section.key=value` in source.data, in order; values are YAML. A section that was a name
    gets keys."""
    for text, after in itertools.zip_longest(overrides, overrides[1:]):
        path, equals, value_text = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            way = f": write {text}={after or 'VALUE'}" if _KEY.fullmatch(text) else ""
            raise RecipeError(f"command line: {short(text)} is not section.key=value{way}")
        value = _value(path, value_text)
        target = source.data
        for depth, key in enumerate(keys[:-1]):
            inner = target.get(key)
            if isinstance(inner, str) and depth == 0:
                inner = {"name": inner}
            if inner is not None and not isinstance(inner, dict):
                parent = ".".join(keys[: depth + 1])
                raise RecipeError(
                    f"command line: {path}: {parent} = {short(inner)} is not a section, it has no "
                    "keys"
                )
            target[key] = dict(inner or {})
            target = target[key]
        target[keys[-1]] = value
        source.overridden.add(".".join(keys))


def _value(path: str, text: str) -> Any:
    try:
        return _parse(text, f"command line: {path}", {})
    except RecipeError as error:
        quoted = f"; if it is text, quote it twice: {path}='\"{text}\"'"
        raise RecipeError(f"{error}{quoted if text[:1] in '{[' else ''}") from None


def write(data: dict[str, Any]) -> str:
    """YAML that `read` turns into the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _parse(text: str, file: str, lines: dict[str, int]) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        # nodes before values: in these there are no lines, tags and duplicate keys any more
        if (node := loader.get_single_node()) is None:
            return None
        for problem, mark in _problems(node):
            raise RecipeError(f"{file}:{mark.line + 1}: {problem}")
        for path, line in _key_lines(node):
            lines[path] = line
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{file}{line}: not valid YAML: {' '.join(str(error.problem).split())}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"{file}: not valid YAML: {short(' '.join(str(error).split()), 120)}"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _problems(root: Node) -> Iterator[tuple[str, yaml.Mark]]:
    """What YAML allows and a recipe does not: tags, duplicate keys, keys that are not text,
    repeated nodes."""
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        # for an alias PyYAML gives the node of its anchor once more
        if id(node) in seen:
            yield (
                "anchors and aliases are not used in recipes: write the value again",
                node.start_mark,
            )
        seen.add(id(node))
        if node.tag not in _PLAIN_TAGS:
            yield (
                f"tag {node.tag.replace(_TAG, '!!')} is not allowed: recipes hold plain values "
                "only",
                node.start_mark,
            )
        if isinstance(node, SequenceNode):
            todo += reversed(node.value)
        if isinstance(node, MappingNode):
            keys: dict[str, int] = {}
            for key, value in node.value:
                if not isinstance(key, ScalarNode) or key.tag != _TAG + "str":
                    yield f"key {short(key.value)} is not text", key.start_mark
                elif key.value in keys:
                    yield (
                        f"duplicate key '{key.value}', first on line {keys[key.value]}",
                        key.start_mark,
                    )
                keys[key.value] = key.start_mark.line + 1
                todo.append(value)


def _key_lines(node: Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, key.start_mark.line + 1
            yield from _key_lines(value, path + ".")


def read_json(path: Path) -> Any:
    """A JSON file without duplicate keys, NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (key, _) in enumerate(pairs):
            if any(key == other for other, _ in pairs[:index]):
                raise RecipeError(f"{path}: duplicate key '{key}'")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise RecipeError(f"{path}: {constant} is not JSON")

    try:
        return json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse
        )
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None

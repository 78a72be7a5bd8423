"""The rooms: a package imports only packages of lower layers, and no two files or packages import
each other in a circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tram_ds"

LAYERS = (  # bottom first; packages of one layer do not know each other
    {"runtime"},
    {"engines", "data"},
    {"models"},
    {"algorithms", "tasks"},
    {"recipe"},
    {"checkpoint", "tracking", "planning"},
    {"evaluation", "jobs"},
    {"training", "comparison"},
    {"surface", "bench", "integrations"},
    {"verification"},
    {"cli"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
Graph = dict[str, set[str]]


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name, without `tram_ds.`, of every module in a package -> its code."""
    found = {}
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    guards = [n for n in guards if "TYPE_CHECKING" in ast.unparse(n.test)]
    return {part for guard in guards for part in ast.walk(guard)}


@cache
def imports() -> Graph:
    """Module -> the modules of tram_ds that it imports, lazily or not."""
    found: Graph = {}
    for module, tree in modules().items():
        names = set()
        typing = for_types_only(tree)
        for node in ast.walk(tree):
            if node in typing:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}: imports are absolute"
                home = node.module or ""
                submodules = {f"{home}.{alias.name}" for alias in node.names}
                inside = {name for name in submodules if name.removeprefix("tram_ds.") in modules()}
                names |= inside or {home}
        ours = {n.removeprefix("tram_ds.") for n in names if n.split(".")[0] == "tram_ds"}
        found[module] = ours - {module}
    return found


def drawing() -> str:
    """The layers as text, the highest first, with what each package is for."""
    lines = []
    for level in range(len(LAYERS) - 1, -1, -1):
        for package in sorted(LAYERS[level]):
            purpose = " ".join(
                (ast.get_docstring(modules()[package]) or "").split("\n\n")[0].split()
            )
            lines += textwrap.wrap(
                f"{level}  {package:<13}{purpose}", 100, subsequent_indent=" " * 16
            )
        lines.append("-" * 60)
    return "\n".join(["```text", *lines[:-1], "```"])


def drawn(page: str) -> str:
    """The page with the drawing of today's layers between its two marks."""
    before, mark, rest = page.partition("<!-- drawing -->\n")
    _, end, after = rest.partition("<!-- /drawing -->")
    assert mark and end
    return f"{before}{mark}{drawing()}\n{end}{after}"


def test_the_drawing_shows_the_house_as_it_is() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert drawn(page) == page, "run python -m tests.test_layers docs/architecture.md"


def test_the_page_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_]+/[a-z_0-9/]+\.(?:py|md))`", page))
    named |= set(re.findall(r"^ +([a-z_]+/[a-z_0-9]+\.py)", page, re.MULTILINE))
    assert len(named) > 20
    assert not [n for n in named if not any((r / n).exists() for r in (ROOT, PACKAGE))]


def circle(graph: Graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_nothing_stands_at_the_top_but_the_public_face() -> None:
    top = sorted(p.name for p in PACKAGE.iterdir() if p.is_file())
    assert top == ["__init__.py", "__main__.py"]  # `python -m tram_ds` needs the second
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == set(LEVEL)


def test_a_package_imports_only_lower_layers() -> None:
    wrong = []
    for module, others in imports().items():
        package = module.split(".")[0]
        for other in others:
            target = other.split(".")[0]
            if target == "tram_ds" and package in LAYERS[-1]:
                continue  # the face has the version
            if target != package and LEVEL.get(target, len(LAYERS)) >= LEVEL[package]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_a_task_knows_no_engine() -> None:
    """Though engines stand lower: a task is a model, rows and a forward, on any sharding."""
    tasks = {m: others for m, others in imports().items() if m.split(".")[0] == "tasks"}
    assert len(tasks) >= 5
    assert not [
        m for m, others in tasks.items() if any(o.split(".")[0] == "engines" for o in others)
    ]


def test_there_is_no_circle() -> None:
    assert not circle(imports())
    packages: Graph = defaultdict(set)
    for module, others in imports().items():
        package = module.split(".")[0]
        packages[package] |= {other.split(".")[0] for other in others} - {package}
    assert not circle(packages)


def test_the_rule_notices_what_breaks_it() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert len(imports()) > 100 and sum(map(len, imports().values())) > 300


def test_every_package_says_what_it_is_for() -> None:
    silent = [p for p in LEVEL if not ast.get_docstring(modules()[p])]
    assert not silent


def test_deepspeed_is_imported_by_its_engine_alone_and_lazily() -> None:
    """Every other module imports in a process where importing deepspeed fails."""
    users = set()
    for module, tree in modules().items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "deepspeed" for name in names):
                users.add(module)
    assert users == {"engines.zero"}
    others = sorted(f"tram_ds.{m}" for m in modules() if m != "engines.zero")
    script = (
        "import sys, importlib\n"
        "sys.modules['deepspeed'] = None\n"  # as if it were not installed, for find_spec too
        f"for name in {others!r}: importlib.import_module(name)\n"
        "print('imported')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("imported\n"), done.stderr


def test_the_step_is_one_screen() -> None:
    """train_step and climb read as Algorithm 1, in at most 40 lines each."""
    body = modules()["algorithms.step"].body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    for name in ("train_step", "climb"):
        node = functions[name]
        assert (node.end_lineno or 0) - node.lineno + 1 <= 40, name


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(drawn(page.read_text()))

"""Who may import whom (DESIGN 2), and that deepspeed stays out of everything but its one engine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tram_ds"
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in PACKAGE.rglob("*.py"))

MATHS = (
    "tram_ds.engines.shards",
    "tram_ds.algorithms.ascent",
    "tram_ds.algorithms.distance",
    "tram_ds.algorithms.trust_region",
    "tram_ds.algorithms.table",
    "tram_ds.algorithms.step",
    "tram_ds.training.run",
)
ENGINES_MAY = ("tram_ds.engines.shards", "tram_ds.runtime.ranks", "tram_ds.models.randomness", "tram_ds.engines")


def imported(module: str) -> set[str]:
    """tram_ds modules a module imports anywhere, lazily or not."""
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__init__.py"
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module} | {name for name in submodules if name in MODULES}
    return found


@pytest.mark.parametrize("position", range(len(MATHS)))
def test_the_maths_is_layered(position: int) -> None:
    """shards <- {ascent, distance} <- region <- algorithm <- step <- train: nothing imports what stands above it."""
    above = set(MATHS[position + 1 :]) | (
        {"tram_ds.algorithms.ascent"} if MATHS[position] == "tram_ds.algorithms.distance" else set()
    )
    assert not imported(MATHS[position]) & above


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("tram_ds.engines")])
def test_engines_know_shards_and_processes_only(module: str) -> None:
    own = {m for m in imported(module) if m.startswith("tram_ds")}
    assert {m for m in own if not m.startswith(ENGINES_MAY)} <= {"tram_ds"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("tram_ds.tasks")])
def test_tasks_know_neither_engines_nor_algorithms(module: str) -> None:
    forbidden = (
        "tram_ds.engines",
        "tram_ds.algorithms.table",
        "tram_ds.algorithms.step",
        "tram_ds.algorithms.trust_region",
        "tram_ds.algorithms.stepper",
        "tram_ds.training.run",
    )
    assert not [m for m in imported(module) if m.startswith(forbidden)]


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_imports_deepspeed(module: str) -> None:
    uses = any(name.split(".")[0] == "deepspeed" for name in imported(module))
    assert uses == (module == "tram_ds.engines.zero")


def test_every_module_imports_without_deepspeed() -> None:
    """In one process where importing deepspeed fails."""
    script = (
        "import sys, importlib\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'deepspeed': raise ImportError('deepspeed is not installed')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {[m for m in MODULES if m != 'tram_ds.engines.zero']!r}: importlib.import_module(name)\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported\n")


def test_the_step_is_short() -> None:
    """train_step reads like Algorithm 1: 40 lines at most."""
    tree = ast.parse((PACKAGE / "algorithms" / "step.py").read_text())
    step = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train_step")
    assert (step.end_lineno or 0) - step.lineno + 1 <= 40

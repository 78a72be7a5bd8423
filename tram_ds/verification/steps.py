"""What is measured, and with how much: steps of parts, a part being one or a few jobs whose result
is one file. Imports no torch: what measures runs in the jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tram_ds.recipe.file import ROOT
from tram_ds.verification import jobs, runs

# (module, arguments..., world=, timeout=) -> what its rank 0 writes; JobFailed
Launch = Callable[..., Any]

WORKER = "tram_ds.verification.worker"
ORACLE = "tests.parity.kit_worker"
ORACLE_FILE = ROOT / "tests" / "parity" / "kit_worker.py"
ENGINES = {
    "replicated": {"name": "replicated"},
    "fsdp2": {"name": "fsdp2", "config": "shard.yaml"},
    "zero2": {"name": "zero", "config": "zero2.json"},
    "zero3": {"name": "zero", "config": "zero3.json"},
}
ROWS = ("base", "sam", "tram_x", "tram_prev")


@dataclass(frozen=True)
class Setting:
    """world: ranks, one a GPU. small: everything tiny, for a CPU."""

    world: int
    small: bool
    launch: Launch = jobs.measure
    oracle: str = ORACLE


@dataclass(frozen=True)
class Case:
    """One model on one engine. size: a name of the worker's SIZES. rows x tokens: of a rank's
    micro-batch. rounds: timed steps of each algorithm."""

    size: str
    engine: str
    rows: int
    tokens: int
    rounds: int


@dataclass(frozen=True)
class Part:
    """name: of its result's file, STEP-WHAT. measure: (seconds it may take) -> the result."""

    step: str
    name: str
    measure: Callable[[float], Any]


# step -> seconds that it may take in one start: what is lent for ten minutes at a time has room for
# each, and one GPU, which has no rank to lose, is done within half an hour
STEPS = {"parity": 480.0, "gpt2": 300.0, "xl": 480.0, "resume": 300.0, "killed": 360.0}


def parts(setting: Setting) -> list[Part]:
    """All that can be measured in this setting, in order."""
    return [
        *_parity(setting),
        *_cases(setting),
        *(_resume(setting, engine) for engine in _few(setting, "fsdp2", "zero3")),
        *([_killed(setting)] if setting.world > 1 else []),
    ]


def _few(setting: Setting, *engines: str) -> tuple[str, ...]:
    return engines[:1] if setting.small else engines


def _parity(setting: Setting) -> list[Part]:
    if not ORACLE_FILE.is_file():
        return []
    engines = ("single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
    rows: tuple[str, ...] = ()  # all
    if setting.small:
        engines, rows = ("single", "zero2"), ("tram_x",)

    def part(engine: str) -> Part:
        world = 1 if engine == "single" else setting.world

        def measure(seconds: float) -> Any:
            return setting.launch(setting.oracle, engine, *rows, world=world, timeout=seconds)

        return Part("parity", f"parity-{engine}", measure)

    return [part(engine) for engine in engines]


def _cases(setting: Setting) -> list[Part]:
    if setting.small:
        sizes = {"gpt2": ("tiny", 2, 32, 1)}
        engines = ("fsdp2",)
    else:
        sizes = {"gpt2": ("gpt2", 8, 1024, 7), "xl": ("gpt2-xl", 4, 1024, 5)}
        engines = tuple(ENGINES)
    found = []
    for step, (size, rows, tokens, rounds) in sizes.items():
        for engine in engines:
            found.append(_case(setting, step, Case(size, engine, rows, tokens, rounds)))
    return found


def _case(setting: Setting, step: str, case: Case) -> Part:
    text = json.dumps(asdict(case))
    return Part(
        step,
        f"{step}-{case.engine}",
        lambda seconds: setting.launch(WORKER, text, world=setting.world, timeout=seconds),
    )


def _resume(setting: Setting, engine: str) -> Part:
    return Part(
        "resume",
        f"resume-{engine}",
        lambda seconds: runs.resumed(setting.launch, ENGINES[engine], setting.world, seconds),
    )


def _killed(setting: Setting) -> Part:
    return Part("killed", "killed", lambda seconds: runs.killed(setting.world, seconds))

"""The kit from its command line to its page: parts measured one after the other, each kept as a
file; what is there is not measured again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tram_ds.runtime.exits import DONE, REQUEUE
from tram_ds.runtime.files import private_dir, write_whole
from tram_ds.verification.jobs import JobFailed
from tram_ds.verification.laws import Facts, verdicts
from tram_ds.verification.page import markdown
from tram_ds.verification.steps import ORACLE_FILE, STEPS, Part, Setting, parts

LEAST = 60.0  # seconds: a part is not begun with less
LOOK = 120.0  # seconds for a look at the machine
BROKEN = 1
NO_ORACLE = "the oracle is the tests': start launch/verify_gpu.py of a checkout"
PAGE = "results.md"


def verify(
    out: Path,
    chosen: Sequence[str],
    setting: Setting,
    command: str,
    limits: Mapping[str, float] = STEPS,
) -> int:
    """Measures what is asked and not there yet, judges all that is there, writes the page. Exit
    code: 0, 1 where a law is broken, 75 where a step's time was over before its parts were done.

    chosen: of STEPS; none: all. limits: seconds of each step. ValueError where `out` has results
    of another machine or setting.
    """
    wanted = known(chosen)
    private_dir(out)
    machine = same_machine(out, setting)
    every, over = parts(setting), []
    for step in wanted:
        end = time.monotonic() + limits[step]
        for part in (part for part in every if part.step == step):
            if not kept(out, part) and not measured(out, part, end, limits[step]):
                over.append(step)
                break
    facts = gathered(out, every, setting, machine, wanted, over)
    told = verdicts(facts)
    took = sum(json.loads(file.read_text())["seconds"] for file in _files(out, every))
    write_whole(out / PAGE, markdown(facts, machine, told, took, command))
    print("\n".join(verdict.line(number) for number, verdict in enumerate(told, 1)))
    print(f"page: {out / PAGE}")
    if any(verdict.state == "BROKEN" for verdict in told):
        return BROKEN
    return REQUEUE if over else DONE


def known(chosen: Sequence[str]) -> list[str]:
    """The steps asked for, in order. ValueError."""
    for name in chosen:
        if name not in STEPS:
            raise ValueError(f"--steps {name}: choose from {', '.join(STEPS)}")
    return [step for step in STEPS if step in (chosen or STEPS)]


def same_machine(out: Path, setting: Setting) -> dict[str, Any]:
    """What the ranks run on. ValueError where it has too few GPUs, or the folder's results are of
    something else."""
    found = setting.launch("tram_ds.verification.machine", world=1, timeout=LOOK)
    if found["kind"] == "cuda" and setting.world > found["gpus"]:
        raise ValueError(
            f"{setting.world} ranks, and the first sees {found['gpus']} GPU(s): the kit starts a "
            "rank for each GPU of one machine, so --nproc_per_node is at most their number"
        )
    found |= {"world": setting.world, "small": setting.small}
    file = out / "machine.json"
    if file.exists():
        before = json.loads(file.read_text())
        for key, text in (("device", "device"), ("world", "ranks"), ("small", "--small")):
            if before[key] != found[key]:
                raise ValueError(
                    f"--out {out}: its results are of {text} {before[key]}, and this is "
                    f"{found[key]}: give another folder"
                )
    write_whole(file, json.dumps(found, indent=1))
    return found


def kept(out: Path, part: Part) -> bool:
    """Whether a result stands; one that failed is measured again."""
    file = _file(out, part)
    return file.exists() and "failed" not in json.loads(file.read_text())["found"]


def measured(out: Path, part: Part, end: float, seconds: float) -> bool:
    """Measures a part and keeps its result, or why there is none. False where the step's time is
    over; nothing is kept then. end: of the step, of time.monotonic; seconds: the whole step's."""
    began = time.monotonic()
    left = end - began
    # half: a step with a limit below LEAST would else never begin
    if left < min(LEAST, seconds / 2):
        return False
    print(f"{part.name} ...", flush=True)
    try:
        found = part.measure(left)
    except JobFailed as error:
        if error.over and left < 0.9 * seconds:
            return False  # it was not given a step's whole time
        found = {"failed": str(error)}
    took = time.monotonic() - began
    text = json.dumps({"part": part.name, "seconds": took, "found": found}, indent=1)
    write_whole(_file(out, part), text)
    print(f"{part.name}: {took:.0f} s{', FAILED' * ('failed' in found)}", flush=True)
    return True


def gathered(
    out: Path,
    every: Sequence[Part],
    setting: Setting,
    machine: dict[str, Any],
    wanted: Sequence[str],
    over: Sequence[str],
) -> Facts:
    """All results that are there, of whichever start."""
    files = {file.stem: json.loads(file.read_text()) for file in _files(out, every)}
    expected = {step: [part.name for part in every if part.step == step] for step in STEPS}
    excused = {step: f"--steps leaves {step} out" for step in STEPS if step not in wanted}
    excused |= {step: f"the time of {step} is over: the same command goes on" for step in over}
    if not ORACLE_FILE.is_file():
        excused["parity"] = NO_ORACLE
    return Facts(
        kind=machine["kind"],
        device=machine["device"],
        world=setting.world,
        small=setting.small,
        results={name: text["found"] for name, text in files.items()},
        expected=expected,
        excused=excused,
    )


def _files(out: Path, every: Sequence[Part]) -> list[Path]:
    return [file for part in every if (file := _file(out, part)).exists()]


def _file(out: Path, part: Part) -> Path:
    return out / f"{part.name}.json"

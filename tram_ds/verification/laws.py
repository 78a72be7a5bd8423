"""Ten laws, and what was measured judged by them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from tram_ds.runtime.exits import PEER

# relative of theta, absolute of losses and distances; fp32 with TF32 off, three steps of SGD
PARITY = {"cpu": 1e-6, "cuda": 2e-5}
PARITY_LOSS = {"cpu": 1e-5, "cuda": 2e-5}
MOVED = 0.05  # the oracle itself must have gone somewhere
PROJECTION = 0.05  # of the realised on the intended epsilon, from 1
LENGTH = 1e-3  # of |epsilon / T| from the radius, relative
PEAK = 0.10  # of the plan
SELF_CHECK = 1.01  # of the step's peak
TRAM_TO_ADAM = 2.40
# model FLOPs of a TRAM step, GPT2-XL, without recomputation
MFU = {"replicated": 0.45, "fsdp2": 0.42, "zero2": 0.40, "zero3": 0.38}
EXPOSED = 0.10  # of a step's time: collectives that nothing hides
REGIONAL = ("tram_x", "tram_prev")
WHERE = re.compile(r"rank \d+: .*step \d+, phase \w+")  # what a survivor has to say

State = Literal["holds", "BROKEN", "not measured"]
Results = Mapping[str, Any]  # by part


@dataclass(frozen=True)
class Facts:
    """What judging depends on. results: what each part measured, or {"failed": why} or {"unfit":
    why}. expected: names of parts by step. excused: why a step's parts are not all there."""

    kind: str
    device: str
    world: int
    small: bool
    results: Results
    expected: Mapping[str, list[str]]
    excused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """broken: what breaks the law, a line each. text: what was measured. unknown: why it cannot be
    judged."""

    broken: list[str] = field(default_factory=list)
    text: str = ""
    unknown: str = ""


@dataclass(frozen=True)
class Verdict:
    """Of one law."""

    law: str
    state: State
    text: str

    def line(self, number: int) -> str:
        """One line for people."""
        return f"{number:2d}. {self.law}: {self.state}: {self.text}"


@dataclass(frozen=True)
class Law:
    """name: what it promises. steps: that measure it. judge: (part -> result) -> Found; why_not:
    why it cannot be measured in this setting at all, or nothing."""

    name: str
    steps: tuple[str, ...]
    judge: Callable[[Results, Facts], Found]
    why_not: Callable[[Facts], str] = lambda facts: ""


def verdicts(facts: Facts) -> list[Verdict]:
    """One of each law, in order. Nothing that was not measured is said to hold."""
    return [_verdict(law, facts) for law in LAWS]


def _verdict(law: Law, facts: Facts) -> Verdict:
    if why := law.why_not(facts):
        return Verdict(law.name, "not measured", why)
    names = [name for step in law.steps for name in facts.expected.get(step, [])]
    there = {name: facts.results[name] for name in names if name in facts.results}
    failed = [f"{name}: {r['failed']}" for name, r in there.items() if "failed" in r]
    unfit = [f"{name} left out: {r['unfit']}" for name, r in there.items() if "unfit" in r]
    sound = {n: r for n, r in there.items() if "failed" not in r and "unfit" not in r}
    found = law.judge(sound, facts) if sound else Found()
    if broken := [*failed, *found.broken]:
        return Verdict(law.name, "BROKEN", "; ".join(broken))
    missing = [name for name in names if name not in there]
    excuses = [facts.excused[step] for step in law.steps if step in facts.excused]
    if missing or not sound:
        left = [f"{', '.join(missing)} left to do"] if missing else []
        why = "; ".join([*dict.fromkeys(excuses), *left, *unfit])
        return Verdict(law.name, "not measured", why or "there is nothing to measure it by")
    # after the failures: what is broken is said even where the rest cannot be judged
    if found.unknown:
        return Verdict(law.name, "not measured", found.unknown)
    return Verdict(law.name, "holds", "; ".join([found.text, *unfit]))


def _parity(results: Results, facts: Facts) -> Found:
    bound, bound_loss = PARITY[facts.kind], PARITY_LOSS[facts.kind]
    broken, worst, cases = [], (0.0, ""), 0
    for part, table in results.items():
        for case, row in table.items():
            cases += 1
            where = f"{part.removeprefix('parity-')} {case}"
            worst = max(worst, (row["theta"], where))
            others = [row[key] for key in ("loss", "distance", "perturbed_loss")]
            well = (
                row["theta"] <= bound
                and all(number <= bound_loss for number in others)
                and row["moved"] > MOVED
                and row["frozen"] == 0.0
            )
            if not well:  # also where a number is NaN
                told = ", ".join(f"{number:.2g}" for number in others)
                broken.append(f"{where}: theta {row['theta']:.2g}, losses and distance {told}")
    text = f"{cases} cases on {len(results)} engines, worst {worst[0]:.1g} ({worst[1]})"
    return Found(_first(broken), f"{text}, bound {bound:g}")


def _first(lines: list[str], most: int = 3) -> list[str]:
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [*lines[:most], *more]


def _rows(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """(`part row`, what was found of it)."""
    return [(f"{part} {row}", of) for part, r in results.items() for row, of in r["rows"].items()]


def _projection(results: Results, facts: Facts) -> Found:
    broken, apart, lengths = [], [0.0], [0.0]
    for where, row in _rows(results):
        if "probe" not in row:
            continue
        apart.append(abs(row["probe"]["perturbation_projection"] - 1))
        lengths.append(abs(row["probe"]["perturbation_length"] / (row["radius"] or 1.0) - 1))
        if not (apart[-1] <= PROJECTION and lengths[-1] <= LENGTH):
            broken.append(f"{where}: {apart[-1]:.2g} from 1, length {lengths[-1]:.2g} off")
    text = (
        f"at most {max(apart):.1g} from 1 (bound {PROJECTION:g}), length off by {max(lengths):.1g}"
    )
    return Found(_first(broken), text)


def _self_check(results: Results, facts: Facts) -> Found:
    broken, share = [], [0.0]
    for where, row in _rows(results):
        broken += [f"{where}: {text}" for text in row.get("self_check", [])]
        if row["peak"] and row.get("self_check_peak"):
            share.append(row["self_check_peak"] / row["peak"])
            if share[-1] > SELF_CHECK:
                broken.append(f"{where}: its peak is {share[-1]:.2f} of the step's")
    peaks = f", its peak at most {max(share):.2f} of the step's" if len(share) > 1 else ""
    return Found(_first(broken), f"passes{peaks}")


def _peak(results: Results, facts: Facts) -> Found:
    ratios = {where: row["peak"] / row["planned"] for where, row in _rows(results)}
    broken = [f"{w}: {r:.2f} of the plan" for w, r in ratios.items() if not abs(r - 1) <= PEAK]
    return Found(_first(broken), f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} of it")


def time_ratios(rows: Mapping[str, Any], row: str) -> list[float]:
    """Seconds of a row's step over those of the base optimizer's, round by round."""
    return [a / b for a, b in zip(rows[row]["seconds"], rows["base"]["seconds"], strict=True)]


def _time(results: Results, facts: Facts) -> Found:
    found = {
        f"{part} {row}": median(time_ratios(r["rows"], row))
        for part, r in results.items()
        for row in REGIONAL
    }
    broken = [f"{w}: {ratio:.2f}" for w, ratio in found.items() if not ratio <= TRAM_TO_ADAM]
    worst = max(found, key=lambda where: found[where])
    return Found(_first(broken), f"at most {found[worst]:.2f} ({worst}), bound {TRAM_TO_ADAM:.2f}")


def _mfu(results: Results, facts: Facts) -> Found:
    found = {
        part.partition("-")[2]: r["rows"]["tram_prev"].get("mfu") for part, r in results.items()
    }
    if None in found.values():
        return Found(unknown=f"the peak of {facts.device} is not known (train.peak_tflops)")
    told = {
        engine: f"{engine} {100 * mfu:.0f} % (goal {100 * MFU[engine]:.0f})"
        for engine, mfu in found.items()
    }
    broken = [told[engine] for engine, mfu in found.items() if not mfu >= MFU[engine]]
    return Found(broken, ", ".join(told.values()))


def _overlap(results: Results, facts: Facts) -> Found:
    broken, told, unseen = [], [], []
    for part, r in results.items():
        trace: dict[str, Any] = r["trace"] or {"failed": "no kernel in the trace"}
        if not trace.get("collective"):
            unseen.append(f"{part}: {trace.get('failed', 'no collective of NCCL in the trace')}")
            continue
        exposed = trace["exposed"] / trace["total"]
        hidden = 1 - trace["exposed"] / trace["collective"]
        share = f"{100 * exposed:.0f} % of the step exposed"
        told.append(f"{part} {100 * hidden:.0f} % hidden, {share}")
        if not exposed <= EXPOSED:
            broken.append(told[-1])
    return Found(_first(broken), "; ".join(told), "; ".join(unseen))


def _resume(results: Results, facts: Facts) -> Found:
    broken = []
    for part, r in results.items():
        whole, cut = r["digests"]
        if r["codes"] != [0, 75, 0]:
            broken.append(f"{part}: the runs ended with {r['codes']}, not [0, 75, 0]")
        elif whole != cut:
            broken.append(f"{part}: the resumed run's weights are others")
    engines = ", ".join(part.removeprefix("resume-") for part in results)
    return Found(broken, f"{engines}: the weights equal bit for bit")


def _killed(results: Results, facts: Facts) -> Found:
    (r,) = results.values()
    ends = [(rank, code) for rank, code in enumerate(r["codes"]) if code != PEER]
    broken = [f"rank {rank} ended with {code}, not {PEER}" for rank, code in ends]
    broken += [
        f"rank {k} did not say its rank, step and phase"
        for k, lines in enumerate(r["said"])
        if not any(WHERE.search(line) for line in lines)
    ]
    took = f"{r['seconds']:.0f} s after the kill, train.timeout {r['timeout']:.0f} s"
    return Found(_first(broken), f"exit {PEER}, rank, step and phase said, {took}")


def _no_xl(facts: Facts) -> str:
    return "--small has no GPT2-XL" if facts.small else ""


def _no_gpu(why: str) -> Callable[[Facts], str]:
    return lambda facts: "" if facts.kind == "cuda" else why


def _alone(facts: Facts) -> str:
    if facts.world == 1:
        return "one rank sends nothing: start it with torchrun --nproc_per_node N"
    return "" if facts.kind == "cuda" else "a CPU has no streams to hide a collective behind"


def _no_peer(facts: Facts) -> str:
    one = "one rank has no peer to lose: start it with torchrun --nproc_per_node N"
    return one if facts.world == 1 else ""


OF_A_GPU = "seconds of a CPU say nothing of a GPU"
LAWS = (
    Law("parity with the float64 oracle", ("parity",), _parity),
    Law("projection of epsilon in bf16", ("gpt2", "xl"), _projection),
    Law("self-check", ("gpt2", "xl"), _self_check),
    Law("peak against plan", ("gpt2", "xl"), _peak, _no_gpu("a GPU's memory is planned")),
    Law("TRAM / Adam, GPT-2 small", ("gpt2",), _time, _no_gpu(OF_A_GPU)),
    Law("TRAM / Adam, GPT2-XL", ("xl",), _time, lambda f: _no_xl(f) or _no_gpu(OF_A_GPU)(f)),
    Law("MFU, GPT2-XL", ("xl",), _mfu, lambda f: _no_xl(f) or _no_gpu(OF_A_GPU)(f)),
    Law("collectives hidden", ("gpt2", "xl"), _overlap, _alone),
    Law("deterministic resume", ("resume",), _resume),
    Law("a killed rank is named", ("killed",), _killed, _no_peer),
)

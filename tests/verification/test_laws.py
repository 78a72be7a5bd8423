"""Each law, by results that keep it and results that do not; and a GPU's trace by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tram_ds.verification.laws import LAWS, Facts, Verdict, verdicts
from tram_ds.verification.page import markdown
from tram_ds.verification.trace import summary

GIB = 2**30
PARITY = {"theta": 1e-6, "loss": 1e-6, "distance": 0.0, "perturbed_loss": 1e-6}
ROW = {
    "planned": 10 * GIB,
    "moment": "the backward of pass 2",
    "peak": 9.5 * GIB,
    "self_check": [],
    "self_check_peak": 9.0 * GIB,
    "probe": {
        "perturbation_projection": 1.02,
        "perturbation_cosine": 0.1,
        "perturbation_length": 0.2,
    },
    "radius": 0.2,
    "seconds": [2.3, 2.4, 2.3],
}
BASE = {
    "planned": 10 * GIB,
    "moment": "the descent",
    "peak": 10.5 * GIB,
    "seconds": [1.0, 1.0, 1.0],
}
CASE = {
    "rows": {"base": BASE, "sam": ROW, "tram_x": ROW, "tram_prev": {**ROW, "mfu": 0.5}},
    "trace": {
        "total": 1000.0,
        "compute": 900.0,
        "collective": 300.0,
        "exposed": 50.0,
        "idle": 50.0,
        "waits": 3,
    },
}
KEPT: dict[str, Any] = {
    "parity-fsdp2": {"tram_x/2": {**PARITY, "moved": 0.3, "frozen": 0.0}},
    "gpt2-zero3": CASE,
    "xl-zero3": CASE,
    "resume-fsdp2": {"codes": [0, 75, 0], "digests": ["a", "a"], "steps": 6},
    "killed": {
        "codes": [6],
        "seconds": 66.0,
        "timeout": 60.0,
        "said": [["rank 0: no progress for 66 s in step 3, phase step: a peer is dead"]],
    },
}
MACHINE = {
    "device": "NVIDIA H100",
    "memory": 80 * GIB,
    "torch": "2.13",
    "cuda": "13",
    "nccl": "2.28",
    "python": "3.12",
    "cores": 16,
    "commit": "abc",
}


def facts(results: dict[str, Any] = KEPT, **changes: Any) -> Facts:
    steps = ("parity", "gpt2", "xl", "resume", "killed")
    expected = {step: [name for name in KEPT if name.startswith(step)] for step in steps}
    given = {"kind": "cuda", "device": "NVIDIA H100", "world": 2, "small": False}
    return Facts(**{**given, "results": results, "expected": expected, **changes})


def verdict(law: str, at: Facts) -> Verdict:
    (found,) = [found for found in verdicts(at) if found.law == law]
    return found


def changed(part: str, *path: str, to: Any) -> dict[str, Any]:
    """KEPT with one value replaced."""
    results = json.loads(json.dumps(KEPT))  # nothing in it twice
    place = results[part]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return results


def test_all_laws_hold_of_results_that_keep_them() -> None:
    found = verdicts(facts())
    assert [v.state for v in found] == ["holds"] * 10, found
    told = {v.law: v.text for v in found}
    assert told["collectives hidden"].startswith(
        "gpt2-zero3 83 % hidden, 5 % of the step exposed"  # 1 - 50 / 300; 50 / 1000
    )
    assert told["peak against plan"] == "0.95 to 1.05 of it"
    assert told["TRAM / Adam, GPT2-XL"] == "at most 2.30 (xl-zero3 tram_x), bound 2.40"


NAN = float("nan")
BREAKS: list[tuple[str, dict[str, Any]]] = [
    *[
        ("parity with the float64 oracle", changed("parity-fsdp2", "tram_x/2", key, to=value))
        for key, value in (
            ("theta", 3e-5),
            ("theta", NAN),
            ("distance", NAN),
            ("perturbed_loss", 1e-3),
            ("moved", 0.0),
            ("frozen", 1e-9),
        )
    ],
    *[
        (
            "projection of epsilon in bf16",
            changed("xl-zero3", "rows", "sam", "probe", f"perturbation_{key}", to=value),
        )
        for key, value in (("projection", 1.06), ("projection", NAN), ("length", 0.201))
    ],
    ("self-check", changed("gpt2-zero3", "rows", "sam", "self_check", to=["not published"])),
    ("self-check", changed("gpt2-zero3", "rows", "sam", "self_check_peak", to=9.7 * GIB)),
    ("peak against plan", changed("gpt2-zero3", "rows", "sam", "peak", to=11.1 * GIB)),
    ("peak against plan", changed("gpt2-zero3", "rows", "base", "peak", to=8.9 * GIB)),
    (
        "TRAM / Adam, GPT-2 small",
        changed("gpt2-zero3", "rows", "tram_x", "seconds", to=[2.5, 2.3, 2.5]),
    ),
    (
        "TRAM / Adam, GPT2-XL",
        changed("xl-zero3", "rows", "tram_prev", "seconds", to=[2.5, 2.3, 2.5]),
    ),
    ("MFU, GPT2-XL", changed("xl-zero3", "rows", "tram_prev", "mfu", to=0.37)),
    ("collectives hidden", changed("xl-zero3", "trace", "exposed", to=101.0)),
    ("deterministic resume", changed("resume-fsdp2", "digests", to=["a", "b"])),
    ("deterministic resume", changed("resume-fsdp2", "codes", to=[0, 0, 0])),
    ("a killed rank is named", changed("killed", "codes", to=[-6])),
    ("a killed rank is named", changed("killed", "said", to=[["rank 0: it hangs"]])),
    *[
        (law.name, {**KEPT, name: {"failed": "no memory"}})
        for law, name in zip(
            LAWS,
            [
                "parity-fsdp2",
                "gpt2-zero3",
                "xl-zero3",
                "xl-zero3",
                "gpt2-zero3",
                "xl-zero3",
                "xl-zero3",
                "gpt2-zero3",
                "resume-fsdp2",
                "killed",
            ],
            strict=True,
        )
    ],
]


@pytest.mark.parametrize(("law", "results"), BREAKS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_law_that_is_broken_is_named(law: str, results: dict[str, Any]) -> None:
    assert verdict(law, facts(results)).state == "BROKEN"
    if not any("failed" in result for result in results.values()):
        others = [v for v in verdicts(facts(results)) if v.law != law]
        assert [v.state for v in others] == ["holds"] * 9


@pytest.mark.parametrize("law", [law.name for law in LAWS])
def test_what_was_not_measured_does_not_hold(law: str) -> None:
    assert verdict(law, facts({})).state == "not measured"
    unfit = {name: {"unfit": "too large"} for name in KEPT}
    found = verdict(law, facts(unfit))
    assert found.state == "not measured" and "too large" in found.text


def test_a_part_of_a_law_is_not_the_law() -> None:
    """GPT-2 small alone says nothing of GPT2-XL; one engine that does not fit is said beside the
    others."""
    some = {name: result for name, result in KEPT.items() if name != "xl-zero3"}
    assert verdict("self-check", facts(some)).text == "xl-zero3 left to do"
    found = verdict("self-check", facts({**KEPT, "xl-zero3": {"unfit": "100 GB, has 40"}}))
    assert found.state == "holds" and found.text.endswith("xl-zero3 left out: 100 GB, has 40")


def test_one_rank_a_cpu_and_an_unknown_gpu_say_why() -> None:
    alone = facts(world=1)
    for law in ("collectives hidden", "a killed rank is named"):
        assert "one rank" in verdict(law, alone).text
    on_cpu = [v.law for v in verdicts(facts(kind="cpu", small=True)) if v.state == "not measured"]
    assert len(on_cpu) == 5
    for seen in (None, {"failed": "CUPTI forbids it"}, {**CASE["trace"], "collective": 0.0}):
        found = verdict("collectives hidden", facts(changed("gpt2-zero3", "trace", to=seen)))
        assert found.state == "not measured" and found.text.startswith("gpt2-zero3: ")
    unknown = changed("xl-zero3", "rows", "tram_prev", to={**ROW})
    assert "peak of NVIDIA H100 is not known" in verdict("MFU, GPT2-XL", facts(unknown)).text


def test_the_page_has_the_device_the_verdict_and_the_numbers() -> None:
    page = markdown(facts(), MACHINE, verdicts(facts()), 1200.0, "the command")
    assert page.startswith("# Verified on NVIDIA H100, 2 ranks\n")
    assert "80 GiB, torch 2.13, CUDA 13, NCCL 2.28" in page and "20.0 minutes" in page
    assert sum(": holds: " in line for line in page.splitlines()) == 10
    cells = "xl-zero3 | tram_prev | 2.300 | 2.30 (2.30 to 2.40) | 9.50 | 0.95"
    assert cells in page and "| gpt2-zero3 | 1.0 | 0.9 | 0.3 | 0.1 | 5 | 3 |" in page


def kernel(name: str, start: float, duration: float, kind: str = "kernel") -> dict[str, Any]:
    return {"cat": kind, "name": name, "ts": start, "dur": duration, "ph": "X"}


def test_a_trace_by_hand() -> None:
    """Computing 0-40 and 50-60, a collective 30-48 of which 8 lie beside nothing, 2 idle; ranges
    that somebody named are no work, launches neither."""
    events = [
        kernel("gemm", 0, 25),
        kernel("gemm", 20, 20),  # of another stream
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 30, 18),
        kernel("Memcpy HtoD", 50, 10, "gpu_memcpy"),
        kernel("FSDP::all_gather", 0, 60, "gpu_user_annotation"),
        kernel("nccl:_all_gather_base", 0, 60, "gpu_user_annotation"),
        kernel("cudaLaunchKernel", 0, 5, "cuda_runtime"),
        kernel("cudaStreamSynchronize", 0, 5, "cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]
    assert summary(events) == {
        "total": 60.0,
        "compute": 50.0,
        "collective": 18.0,
        "exposed": 8.0,
        "idle": 2.0,
        "waits": 1,
    }
    assert summary([kernel("aten::mm", 0, 9, "cpu_op")]) is None

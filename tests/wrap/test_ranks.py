"""The same laws on two ranks, under each way of sharding."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from tests import ranks
from tests.wrap.worker import BRANCHES

CLOSE = 2e-6
HOLD = ("by hand", "frozen layer", "buffers", "a step that raised", "export of frozen")
SUBSET = "does not hold 0.weight"
CASES: dict[str, dict[str, str | None]] = {
    "ddp": {
        **dict.fromkeys(HOLD),
        "optimizer over some": SUBSET,
        "changed after wrap": "changed after DistributedDataParallel",
        "state of nadam": None,
        "state of adagrad": None,
        "state of adafactor": None,
        "compile of ddp": None,
        "ddp of compile": None,
        "module around ddp": None,
        "parameter outside ddp": "extra.weight lies outside the DistributedDataParallel",
        "plain module": "a plain Sequential in a job of 2 ranks",
        "loaded apart": "do not hold the same weights: load the same on every rank",
        "drifting": "RuntimeError: the ranks do not hold the same weights any more",
        "unused": "extra.weight got no gradient.*find_unused_parameters=True",
        "unused and looked for": None,
    },
    "fsdp2": {
        **dict.fromkeys(HOLD),
        "optimizer over some": SUBSET,
        "changed after wrap": "changed after fully_shard",
        "hybrid": None,
        "drifting hybrid": "RuntimeError: the ranks do not hold the same weights any more",
        "reduced once": None,
        "state of nadam": None,
        "state of adagrad": None,
        "state of adafactor": "Adafactor looks at whole parameters",
    },
    "zero2": {
        **dict.fromkeys(HOLD),
        "optimizer over some": SUBSET,
        "changed after wrap": "changed after deepspeed.initialize",
        "state of nadam": "NAdam keeps mu_product",
        "state of adagrad": None,
        "state of adafactor": "Adafactor looks at whole parameters",
    },
}
CASES["zero3"] = dict(CASES["zero2"])
for engine, kinds in BRANCHES.items():
    CASES[engine] |= dict.fromkeys(f"branches of {kind}" for kind in kinds)


@functools.cache
def results(engine: str) -> dict[str, Any]:
    return ranks.run("tests.wrap.worker", engine, timeout=300)


@pytest.mark.parametrize("engine, case", [(e, c) for e, found in CASES.items() for c in found])
def test_right_or_refused(engine: str, case: str) -> None:
    refusal, (verdict, detail) = CASES[engine][case], results(engine)[case]
    if refusal is None:
        assert verdict == "holds", detail
        assert detail < CLOSE
    else:
        assert verdict == "refused", f"went on, {detail} from the step by hand"
        assert re.search(refusal, detail), detail


@pytest.mark.parametrize("engine", CASES)
def test_every_case_is_looked_at(engine: str) -> None:
    assert results(engine).keys() == CASES[engine].keys()

"""What is kept of the oracle is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import answers
from tests.parity.answers import Question, computed, kept_in


def test_an_answer_is_computed_once_and_the_oracles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Question("tram_prev", 2, options={"radius_scale": s}) for s in (20.0, 10.0)]
    want = [computed(question) for question in asked]
    assert want[0].reports != want[1].reports
    written = [kept_in(tmp_path)(question) for question in asked]
    monkeypatch.setattr(answers, "computed", None)  # asked again, it would be called
    for answer in (written, [kept_in(tmp_path)(question) for question in asked]):
        for got, one in zip(answer, want, strict=True):
            assert got.reports == one.reports
            assert got.theta.keys() == one.theta.keys()
            assert all(got.theta[name].equal(p) for name, p in one.theta.items())

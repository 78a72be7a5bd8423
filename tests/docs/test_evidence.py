"""docs/evidence.md says what the result files beside it say: of none, of some, and of no others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.real import evidence
from tram_ds.comparison.runs import from_folders
from tram_ds.jobs import sweep
from tram_ds.jobs.sweep import Cell
from tram_ds.recipe.recipe import dump

STEPS = 626
RATES = {"5e-05": 62.0, "0.0001": 70.0}  # -> English accuracy of the base arms


@cache
def cells() -> list[Cell]:
    return sweep.cells(sweep.read(evidence.SWEEP))


def some() -> list[Cell]:
    """Two base arms of 626 steps and tram_x, two seeds each."""
    names = [
        f"xnli_e5-{arm}"
        for seed in (0, 1)
        for arm in (
            *(f"base-{seed}-lr={rate}-steps={STEPS}" for rate in RATES),
            f"tram_x-{seed}-radius=relative-rho=0.5",
        )
    ]
    return [cell for cell in cells() if cell.run_dir.name in names]


def finished(cell: Cell) -> None:
    """A run folder as training leaves it, in this folder: 36 seconds a step."""
    run = cell.run_dir
    (run / "export").mkdir(parents=True)
    (run / "export" / "model.safetensors").write_bytes(bytes(1000))
    (run / "recipe.yaml").write_text(dump(cell.recipe))
    rate = next((r for r in RATES if f"lr={r}-" in run.name), None)
    english = RATES[rate] if rate else 66.0
    english += cell.recipe.train.seed
    scores = {"en": english, "sw": english - 9, "ur": english - (10 if rate else 6)}
    results = {
        "train_domains": ["en"],
        "selected": {"step": STEPS},
        "scores": {"test": {d: {"loss": 1.0, "accuracy": v / 100} for d, v in scores.items()}},
        "initial": None,
        "samples": [{"prompt": "a pair", "text": "of the data", "ended": "end"}],
        "warnings": [] if rate else ["over the first 100 steps tram_x climbs too far"],
    }
    (run / "results.json").write_text(json.dumps(results))
    lines = [
        {"step": s, "loss": 1 + 1 / s, "seconds": 36.0, "tokens": 16, "distance": 0.1}
        for s in range(1, STEPS + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tags = {"device": "cpu", "train_rows": "5010", "run_folder": str(run.resolve())}
    (run / "tracking.json").write_text(json.dumps({"uri": "http://host:5000", "tags": tags}))
    (run / "DONE").touch()
    if run.name == evidence.DECIDES:
        half = {"interpolation": 0.5, "path": str(run.resolve() / "export")}
        half["scores"] = {d: {"accuracy": v / 100 - 0.02} for d, v in scores.items()}
        (run / "analysis").mkdir()
        (run / "analysis" / "interpolation.json").write_text(
            json.dumps({"split": "test", "metric": "accuracy", "models": [half]})
        )


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for cell in some():
        finished(cell)
        evidence.keep(cell, tmp_path / "kept" / evidence.SWEEP)
    return tmp_path / "kept" / evidence.SWEEP


def test_the_committed_page_is_what_the_command_makes() -> None:
    text = evidence.PAGE.read_text(encoding="utf-8")
    made, section = evidence.page(text, evidence.KEPT, cells())
    assert made == text, "python -m tests.real.evidence"
    picture = evidence.KEPT.with_suffix(".png")
    assert picture.exists() == (section is not None)
    if section is not None:
        assert Image.open(picture).info["Description"] == evidence.digest(evidence.KEPT)


def test_of_no_run_it_says_that_there_is_none(tmp_path: Path) -> None:
    text, section = evidence.page(evidence.PAGE.read_text(), tmp_path / "none", cells())
    assert section is None and len(cells()) == 48
    assert "**No run yet.** E-XNLI is registered below; of its 48 runs none has its result" in text
    assert "<!-- results -->\nNo run yet: 0 of 48.\n<!-- /results -->" in text


def test_of_some_it_has_their_numbers_and_says_what_is_missing(kept: Path) -> None:
    text, section = evidence.page(evidence.PAGE.read_text(), kept, cells())
    assert section is not None and "**Partial**: 6 of the 48 runs of E-XNLI are there." in text
    assert "Missing, 42 of 48: `xnli_e5-base-lr=2e-05-steps=626` (seed 0, 1, 2)" in text
    assert "`xnli_e5-base-lr=5e-05-steps=626` (seed 2)" in text
    assert f"The study is not void: `{evidence.DECIDES}` has 70.0 % in English" in text
    name = "xnli_e5-tram_x-1-radius=relative-rho=0.5"
    assert f"Said by {name}: over the first 100 steps tram_x climbs too far." in text
    # 626 steps of 36 seconds; the mean of 58 and 61
    assert f"| `{name}` | 67.00 | 58.00 | 61.00 | 59.50 | 626 | 6.26 |" in text
    for kind in ("steps", "FLOPs"):
        assert f"#### off the frontier of plain training at equal {kind}\n" in text
    rows = next(b for b in section.blocks if b.name == "frontier_steps").rows
    assert [row for row, _ in rows] == [
        "tram_x",
        "adam (optimizer.lr=0.0001) at 0.5",
    ]
    again, _ = evidence.page(text, kept, cells())
    assert again == text, "made again it is the same"
    evidence.draw(section, kept)
    picture = Image.open(kept.with_suffix(".png"))
    assert picture.info["Description"] == evidence.digest(kept)
    assert (np.asarray(picture.convert("L")) < 200).mean() > 0.005, "a blank picture"


def test_what_is_kept_is_small_and_says_the_same(kept: Path) -> None:
    """No weights, no samples of the data, no address, no path of this machine; the course is that
    of all 626 records."""
    files = [p for p in kept.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {
        "recipe.yaml",
        "results.json",
        "metrics.jsonl",
        "tracking.json",
        "interpolation.json",
    }
    text = "".join(p.read_text() for p in files)
    assert "host:5000" not in text and str(kept.parents[1]) not in text and "a pair" not in text
    assert sum(p.stat().st_size for p in files) < 20_000 * len(some())
    before, after = (from_folders([f"{place}/*"])[0] for place in ("runs", kept))
    for then, now in zip(before, after, strict=True):
        assert (now.scores, now.course.curve) == (then.scores, then.course.curve)
        assert now.course.steps == then.course.steps == STEPS
        assert now.course.seconds == pytest.approx(then.course.seconds) == STEPS * 36
        assert now.course.tokens == pytest.approx(then.course.tokens)
        assert now.interpolation == then.interpolation and now.train_rows == then.train_rows


def test_another_recipe_is_refused(kept: Path) -> None:
    run = kept / evidence.DECIDES
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("warmup_steps: 50", "warmup_steps: 51")
    )
    with pytest.raises(ValueError, match=r"registered run: schedule\.warmup_steps: 51 -> 50"):
        evidence.page(evidence.PAGE.read_text(), kept, cells())
    run.rename(kept / "xnli_e5-base-7")
    with pytest.raises(ValueError, match="xnli_e5-base-7: is no run of frontier_e5"):
        evidence.page(evidence.PAGE.read_text(), kept, cells())

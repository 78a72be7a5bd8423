"""The loss-surface analyses say the same on every engine, and launch/analyze.py says it to its
users."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tram_ds.cli import main as tram
from tram_ds.recipe.loading import load
from tram_ds.tasks import choose as tasks

SCRIPT = ranks.ROOT / "launch" / "analyze.py"
ENGINES = ("fsdp2", "zero2", "zero3")


@functools.cache
def found(engine: str) -> dict[str, Any]:
    return ranks.run("tests.parity.analysis_worker", engine, world=1 if engine == "single" else 2)


def numbers(value: Any) -> list[float]:
    """All the numbers of a result, in order; neither its settings' text nor its flags."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers(value[key])]
    if isinstance(value, list):
        return [x for inner in value for x in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parity
@pytest.mark.parametrize(
    "what", ("sharpness", "juneja", "paper", "cka_first", "cka_mean", "landscape", "hessian")
)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_finds_what_one_process_finds(engine: str, what: str) -> None:
    got, want = dict(found(engine)[what]), dict(found("single")[what])
    if what == "hessian":  # where the iteration ended, not what it found
        assert got.pop("residual") < 1e-2 and want.pop("residual") < 1e-2
        assert got.pop("products") == want.pop("products") > 2
    assert numbers(got) == pytest.approx(numbers(want), rel=1e-5, abs=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("engine", ("single", *ENGINES))
def test_the_weights_are_as_before_bit_for_bit(engine: str) -> None:
    assert found(engine)["changed"] == 0.0


@pytest.mark.parity
def test_the_problem_is_one_where_an_error_would_show() -> None:
    single = found("single")
    assert (
        single["sharpness"]["value"] > 1.0
        and single["juneja"]["value"] > 1.0
        and single["paper"]["value"] > 1e-4
    )
    assert 0.1 < single["cka_first"]["value"] < 0.999 and 0.1 < single["cka_mean"]["value"] < 0.999
    assert (
        max(single["landscape"]["line"]) - min(single["landscape"]["line"]) > 0.1
        and single["hessian"]["value"] > 1.0
    )


RECIPE = """
task:
  {name: language_modeling, data: generated, seq_len: 16, max_eval_tokens: 200, cache_dir: cache}
model: {init: {architecture: gpt2, n_layer: 1, n_embd: 16, n_head: 2}, dtype: bfloat16}
algorithm: asam
optimizer: {lr: 1e-3}
train: {steps: 1, global_batch: 8, micro_batch: 4, seed: 3}
"""
FEW = ("landscape.points=3", "landscape.plane_points=3", "hessian.rows=6", "hessian.iterations=8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and the run folder of other weights than its model's."""
    place = tmp_path_factory.mktemp("place")
    run_dir = place / "runs" / "tiny-asam-3"
    run_dir.mkdir(parents=True)
    for file in (place / "tiny.yaml", run_dir / "recipe.yaml"):
        file.write_text(RECIPE)
    task = tasks.build(load(str(place / "tiny.yaml"), [f"task.cache_dir={place / 'cache'}"]))
    model = task.model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.save_pretrained(run_dir / "export")  # type: ignore[operator]
    return place


def main(*words: str) -> int:
    return tram.main(["analyze", *words])


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "analysis.json").read_text())


@pytest.mark.integration
def test_the_script_measures_each_domain_and_adds_to_what_is_there(
    place: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(place)
    run_dir = place / "runs" / "tiny-asam-3"
    assert (
        main(
            "--recipe",
            "tiny.yaml",
            "--what",
            "sharpness,cka",
            "--domains",
            "animals,weather",
            "--sharpness",
            "juneja",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "animals*" in out and "zero-shot average (1)" in out and "CKA" in out
    first = report(run_dir)
    assert list(first["domains"]) == ["animals", "weather"] and first["train_domains"] == [
        "animals"
    ]
    assert (
        first["domains"]["weather"]["sharpness"]["variant"] == "juneja"
        and first["algorithm"] == "asam"
    )
    assert (
        first["domains"]["weather"]["cka"]["pooling"] == "mean"
        and 0 < first["domains"]["weather"]["cka"]["value"] < 1
    )
    assert (
        main("--recipe", "tiny.yaml", "--export", str(run_dir), "--what", "landscape,hessian", *FEW)
        == 0
    )
    second = report(run_dir)
    assert set(second["domains"]) == {"animals", "colours", "numbers", "weather"}
    assert {"sharpness", "cka", "landscape", "hessian"} == set(second["domains"]["weather"])
    assert second["domains"]["weather"]["sharpness"] == first["domains"]["weather"]["sharpness"]
    files = {f.name for f in (run_dir / "analysis").iterdir()}
    assert files >= {
        "sharpness.json",
        "cka.json",
        "landscape.png",
        "landscape.svg",
        "landscape-weather.svg",
    }
    values = json.loads((run_dir / "analysis" / "cka.json").read_text())
    assert values == {d: first["domains"][d]["cka"]["value"] for d in ("animals", "weather")}


@pytest.mark.integration
def test_the_script_on_two_ranks_says_the_same_and_discards_results_of_other_weights(
    place: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(place)
    words = ["--recipe", "tiny.yaml", "--domains", "weather", "--split", "test", "--rows", "9"]
    assert main(*words, *FEW) == 0
    one = report(place / "runs" / "tiny-asam-3")
    (place / "runs" / "tiny-asam-3" / "analysis.json").unlink()
    done = ranks.script(SCRIPT, *words, *FEW, "engine=fsdp2", world=2)
    assert done.returncode == 0, done.stderr[-3000:]
    two = report(place / "runs" / "tiny-asam-3")
    # results on another split are not kept beside it
    assert one["split"] == "test" and list(one["domains"]) == ["weather"]
    for name in ("sharpness", "cka", "landscape"):
        assert numbers(two["domains"]["weather"][name]) == pytest.approx(
            numbers(one["domains"]["weather"][name]), rel=1e-4
        )
    eigenvalues = [r["domains"]["weather"]["hessian"]["value"] for r in (one, two)]
    assert eigenvalues[0] == pytest.approx(eigenvalues[1], rel=1e-3) and math.isfinite(
        eigenvalues[0]
    )
    assert done.stdout.count("zero-shot average") == 1


@pytest.mark.integration
def test_what_a_step_does_is_a_table_before_any_run(
    place: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(place)
    rows = "effect.algorithms=[base, asam, {name: tram_x, sigma: 0.3}]"
    before = sorted(place.rglob("*"))
    assert main("--recipe", "tiny.yaml", "run_dir=nowhere", "--what", "effect", rows) == 0
    assert [f for f in sorted(place.rglob("*")) if f not in before and "cache" not in str(f)] == []
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[1].strip() for row in table[2:5]] == ["base", "asam", "tram_x sigma=0.3"]
    assert [row[-2].strip() for row in table[2:4]] == ["does not act", "acts"]
    assert main("--recipe", "tiny.yaml", "--what", "effect", "effect.steps=1") == 0
    assert "asam" in capsys.readouterr().out  # the recipe's own row


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "effect,cka"], "ask for it alone"),
        (["--what", "effect", "--domains", "weather"], "--domains: --what effect reads"),
        (["--what", "effect", "--rows", "3"], "--rows: --what effect reads"),
        (["--what", "effect", "effect.algorithms=[sam, asm]"], "did you mean"),
        (["--what", "effect", "effect.algorithms=[{name: sam, sigma: 1}]"], "does not read"),
        (["--what", "effect", "effect.algorithms=[]"], "effect.algorithms"),
        (["--what", "effect", "effect.steps=0"], "effect.steps"),
        (["--what", "effet"], "did you mean 'effect'"),
        (["--what", "sharpnes"], "did you mean 'sharpness'"),
        (["--export", "nowhere"], "nowhere holds no exported weights"),
        (["train.seed=4"], "train the recipe first"),
        (["--domains", "wether"], "wether"),
        (["cka.pooling=last"], "cka.pooling = 'last': expected one of auto, first, mean"),
        (["--rows", "0"], "--rows 0"),
        (["model.init.n_embd=32"], "give the recipe it was trained with"),
    ],
)
def test_a_mistake_is_named_with_exit_2(
    place: Path, monkeypatch: Any, capsys: Any, words: list[str], message: str
) -> None:
    monkeypatch.chdir(place)
    assert main("--recipe", "tiny.yaml", *words) == 2
    assert message in capsys.readouterr().err

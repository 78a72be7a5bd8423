"""Every row on two real pre-trained models: whether it acts, and how much, in orders of magnitude;
then trained on two ranks, exported and scored. Most on their first layers: the weights, embeddings
and tokenizers are real, and what a row does is not said by the depth. Some on all layers."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests import ranks
from tests.real import e5, packages, smollm2
from tram_ds.algorithms.effect import Effect
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.recipe.loading import load
from tram_ds.surface.effect import Options, recipes, run_rows

pytestmark = [pytest.mark.slow, pytest.mark.integration]

PEOPLE = ["A man", "A woman", "The old teacher", "Two children", "My neighbour", "A tall girl"]
DOING = ["eats bread", "sleeps on the sofa", "plays football", "reads a letter", "opens the door"]
SIZED = (("e5", 0.5), ("smollm2", 0.05))
HEARD = ["is tired", "is outside", "likes books", "eats something", "is not at home"]


def pairs() -> dict[str, list[Any]]:
    """Premise, hypothesis, label of 150 made-up pairs: no method is judged by what it learns."""
    rows = [(f"{a} {b}.", f"{a} {c}.") for a, b, c in product(PEOPLE, DOING, HEARD)]
    first, second = zip(*rows, strict=True)
    labels = [sum(map(ord, a + b)) % 3 for a, b in rows]
    return {"premise": list(first), "hypothesis": list(second), "label": labels}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


def recipe(place: Path, kind: str, layers: int | None = 3) -> Path:
    """A recipe on the real model, or on its first layers; skips where its package cannot be had."""
    table = pairs()
    if kind == "e5":
        for split in ("train", "validation", "test"):
            (place / "xnli" / "en").mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(table), place / "xnli" / "en" / f"{split}-0.parquet")
        model = e5.folder("e5-pairs", [*table["premise"], *table["hypothesis"]])
        task = {"name": "entailment", "data": str(place / "xnli"), "train": "en", "seq_len": 32}
        train = {"steps": 2, "global_batch": 16, "micro_batch": 8}
    else:
        for domain, column in (("doing", "premise"), ("heard", "hypothesis")):
            (place / "text" / domain).mkdir(parents=True, exist_ok=True)
            for split in ("train", "valid", "test"):
                (place / "text" / domain / f"{split}.txt").write_text("\n".join(table[column]))
        model = smollm2.folder()
        task = {"name": "language_modeling", "data": str(place / "text"), "train": "doing"}
        task |= {"eval": ["heard"], "seq_len": 64, "max_eval_tokens": 130}
        train = {"steps": 2, "global_batch": 2, "micro_batch": 1}
    content = {
        "task": {**task, "cache_dir": str(place / "cache")},
        "model": {"path": str(packages.shortened(model, layers) if layers else model)},
        "algorithm": "asam",
        "optimizer": {"name": "adam", "lr": 2e-5, "betas": [0.9, 0.99]},
        "train": train,
        "tracking": {"enabled": False},
    }
    file = place / f"{kind}-{layers}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@cache
def table(place: Path, kind: str) -> dict[str, Effect]:
    """`--what effect` of every row."""
    return measured(place, kind, "all")


def measured(place: Path, kind: str, rows: Any, layers: int | None = 3) -> dict[str, Effect]:
    """Of the second step, the first that has weights behind it. The larger model takes one
    micro-batch a step: how two become one is shown elsewhere."""
    asked = Options(algorithms=rows, steps=2)
    given = Namespace(recipe=str(recipe(place, kind, layers)), smoke=False)
    less = ["train.global_batch=1"] if kind == "smollm2" else []
    return dict(run_rows(recipes(given, less, asked), asked, None)[1])


@pytest.mark.parametrize("kind", ("e5", "smollm2"))
def test_every_row_runs_on_a_real_model(place: Path, kind: str) -> None:
    rows = table(place, kind)
    assert set(rows) == set(ALGORITHMS)
    assert all(abs(e.change) < 1e3 and e.loss > 0.0 for e in rows.values())
    assert rows["base"].change == 0.0


@pytest.mark.parametrize("kind", ("e5", "smollm2"))
@pytest.mark.parametrize(
    "row", ("sam", "asam", "fsam", "functional_sam", "asam_trpo", "asam_r3f", "asam_mesa")
)
def test_a_constant_radius_acts(place: Path, kind: str, row: str) -> None:
    found = table(place, kind)[row]
    assert 0.01 < found.change < 10 and found.acts, found


def test_fsam_at_its_defaults_is_sam_at_its_radius(place: Path) -> None:
    """F = 1 + eta g^2 is 1 at the gradients of fine-tuning: the same step under another name."""
    fsam, sam = measured(place, "e5", ["fsam", {"name": "sam", "rho": 0.1}]).values()
    assert fsam.change == pytest.approx(sam.change, rel=0.02)


def test_dropout_is_the_scale_where_there_is_some(place: Path) -> None:
    assert table(place, "e5")["asam"].masks > 0.1
    assert table(place, "smollm2")["asam"].masks == 0.0


@pytest.mark.parametrize("row", ("tram_prev", "tram_init", "tram_x"))
def test_a_distance_on_a_new_head_does_not_act(place: Path, row: str) -> None:
    """Predictions near uniform differ by nothing: d is 1e-4 and less, so is the change."""
    found = table(place, "e5")[row]
    assert found.radius < 1e-2 and not found.too_far
    assert found.change < 0.05 * table(place, "e5")["asam"].change, found


@pytest.mark.parametrize(("kind", "rho"), SIZED)
def test_a_distance_with_a_size_acts(place: Path, kind: str, rho: float) -> None:
    """The rule of the recipes that are not the paper's, where the paper's does nothing (e5) or was
    never tuned."""
    sized = [{"name": n, "radius": "relative", "rho": rho} for n in ("tram_prev", "tram_x")]
    for found in measured(place, kind, sized).values():
        assert 0.01 < found.change < 10 and found.verdict == "acts", found


@pytest.mark.parametrize(("kind", "rho"), SIZED)
def test_the_whole_depth_acts_alike(place: Path, kind: str, rho: float) -> None:
    rows = ["asam", {"name": "tram_x", "radius": "relative", "rho": rho}]
    asam, tram_x = measured(place, kind, rows, layers=None).values()
    assert 0.01 < asam.change < 10 and asam.acts, asam
    assert 0.01 < tram_x.change < 10 and tram_x.verdict == "acts", tram_x


@pytest.mark.parametrize(
    ("kind", "engine", "layers"),
    [("e5", "zero3", 3), ("e5", "fsdp2", 3), ("smollm2", "zero3", 3), ("smollm2", "fsdp2", None)],
)
def test_two_steps_on_two_ranks_then_export_and_scores(
    place: Path, kind: str, engine: str, layers: int | None
) -> None:
    """What the export scores in one process is what the run says of it."""
    words = {"zero3": "engine={name: zero, config: zero3.json}", "fsdp2": "engine=fsdp2"}
    given, run_dir = ["--recipe", str(recipe(place, kind, layers))], place / f"{kind}-{engine}"
    go("train", *given, words[engine], f"run_dir={run_dir}", cwd=place, world=2)
    results = json.loads((run_dir / "results.json").read_text())
    assert results["selected"]["step"] == 2
    scores = results["scores"]["test"]
    out = place / f"{kind}-{engine}.json"
    go("evaluate", *given, "--model", str(run_dir), "--no-pretrained", "--out", str(out), cwd=place)
    again = json.loads(out.read_text())["models"][0]["scores"]
    for domain, score in scores.items():
        assert again[domain]["loss"] == pytest.approx(score["loss"], rel=1e-4)
        assert score["loss"] > 0.0
        if layers is None or kind == "e5":  # the first layers alone are no language model
            assert score["loss"] < 12.0


def go(name: str, *words: str, cwd: Path, world: int = 1) -> None:
    program = ranks.ROOT / "launch" / f"{name}.py"
    done = ranks.script(program, *words, cwd=cwd, world=world, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_recipes_of_this_file_hold(place: Path) -> None:
    assert load(str(recipe(place, "smollm2"))).algorithm.name == "asam"

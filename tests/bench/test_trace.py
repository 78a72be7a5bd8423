"""One rank of eight, traced without memory: what it holds, sends and computes, against numbers
derived by hand, and the plan's formula against both."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch.utils.weak import WeakIdKeyDictionary

from tests.bench import trace_table
from tram_ds.bench import trace, tracker
from tram_ds.bench.trace import Trace
from tram_ds.cli import main as tram
from tram_ds.planning import plan
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe

WORLD, LAYERS, WIDTH, ROWS, LENGTH, VOCABULARY = 8, 2, 64, 2, 32, 512
# every first dimension is a multiple of 8, so that nothing is padded
SIZES = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "n_positions": LENGTH}
BLOCK = 12 * WIDTH**2 + 13 * WIDTH  # two norms, two products of attention, two of the MLP
N = LAYERS * BLOCK + (VOCABULARY + LENGTH + 2) * WIDTH  # tied embeddings, positions, last norm
PARAMETERS = 12 * LAYERS + 4
TOKENS = ROWS * LENGTH
# FLOPs of a forward pass: 2 per weight of a product and token; a T x T product of attention
PRODUCTS = 2 * TOKENS * (12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH)
SQUARE = LAYERS * 2 * ROWS * LENGTH**2 * WIDTH


def recipe(
    row: str,
    world: int = WORLD,
    engine: dict[str, str] | None = None,
    micros: int = 1,
    **model: Any,
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "traced",
            "task": {"name": "language_modeling", "data": "generated", "seq_len": LENGTH},
            "model": {
                "init": {"architecture": "gpt2", "vocab_size": VOCABULARY, **SIZES, **model},
                "dropout": 0.0,
                "dtype": "bfloat16",
            },
            "algorithm": row,
            "optimizer": {"name": "adam", "lr": 1e-5},
            "engine": engine or {"name": "fsdp2", "config": "shard.yaml"},
            "train": {"steps": 1, "global_batch": ROWS * world * micros, "micro_batch": ROWS},
        }
    )


@cache
def traced(row: str) -> Trace:
    return trace.trace(recipe(row), WORLD)


@pytest.mark.parametrize(("row", "forwards", "backwards"), [("base", 1, 1), ("tram_x", 3, 2)])
def test_what_eight_ranks_send_and_compute(row: str, forwards: int, backwards: int) -> None:
    """Each pass gathers every block and the root in bf16, and each backward pass once more; it
    reduces them in fp32. The losses and norms of a pass are one all-reduce."""
    found, units = traced(row), LAYERS + 1
    gathers = forwards + backwards
    assert found.calls["allgather"] == gathers * units
    assert found.bytes["allgather"] == gathers * 2 * N
    assert found.calls["reduce_scatter"] == backwards * units
    assert found.bytes["reduce_scatter"] == backwards * 4 * N
    assert found.calls["small"] == backwards
    planned = plan.plan(recipe(row), WORLD).cost
    assert planned.sent == found.bytes
    # attention takes two products forward, and five backward, of which one is taken anew: the plan
    # has four
    assert found.flops == (forwards + 2 * backwards) * PRODUCTS + (
        (2 * forwards + 5 * backwards) * SQUARE
    )
    assert found.flops == pytest.approx(planned.hardware_flops / WORLD, rel=0.02)


@pytest.mark.parametrize(("row", "gathers", "backwards"), [("base", 2, 1), ("tram_prev", 5, 2)])
def test_an_untied_models_embedding_and_head_are_gathered_apart(
    row: str, gathers: int, backwards: int
) -> None:
    """Three units beside the blocks: the root, the embedding, the head. The vocabulary is most of
    this model, and the plan knows what the moments hold of it."""
    large = recipe(row, n_embd=128, vocab_size=32768, tie_word_embeddings=False)
    found, planned = trace.trace(large, WORLD), plan.plan(large, WORLD)
    assert found.calls["allgather"] == gathers * (LAYERS + 3)
    assert found.calls["reduce_scatter"] == backwards * (LAYERS + 3)
    assert planned.cost.sent == found.bytes
    assert planned.memory.total == pytest.approx(found.total, rel=0.1), planned.memory


def test_a_gradient_that_is_reduced_once_is_held_whole_until_then(tmp_path: Path) -> None:
    """Three micro-batches: each gathers, and the third's backward reduces, of both passes."""
    (tmp_path / "once.yaml").write_text("reduce_every_micro_batch: false\n")
    config = {"name": "fsdp2", "config": str(tmp_path / "once.yaml")}
    asked = recipe("sam", engine=config, micros=3, n_embd=256, vocab_size=4096)
    found, planned = trace.trace(asked, WORLD), plan.plan(asked, WORLD)
    assert found.calls["reduce_scatter"] == 2 * (LAYERS + 1)
    assert found.calls["allgather"] == 3 * 4 * (LAYERS + 1)
    assert planned.cost.sent == found.bytes
    assert planned.memory.gradients == 4 * planned.size.parameters
    assert planned.memory.total == pytest.approx(found.total, rel=0.1), planned.memory


def test_what_a_rank_holds() -> None:
    """masters and moments, 4 and 8 bytes of an eighth of the parameters; Adam counts its steps."""
    found = traced("base")
    assert found.peak["Sharded Param"] == 4 * N // WORLD
    assert found.peak["OptState"] == 8 * N // WORLD + 4 * PARAMETERS
    assert found.total == sum(found.peak.values())


def test_modules_that_are_not_listed_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside torch's own table of them, at whose modules the tracker looks at every operator."""
    monkeypatch.setattr(tracker, "_Modules", WeakIdKeyDictionary)
    assert trace.trace(recipe("base"), WORLD) == traced("base")


def test_one_process_is_traced_too() -> None:
    """Replicated: no collective, and all of masters and moments."""
    alone = trace.trace(recipe("sam", 1, {"name": "replicated"}), 1)
    assert alone.calls == {} and alone.bytes == {}
    assert alone.peak["Parameter"] == 4 * N
    assert alone.peak["Optstate"] == 8 * N + 4 * PARAMETERS


REFUSED: dict[str, tuple[Recipe, str, str]] = {
    "zero": (
        recipe("sam", engine={"name": "zero", "config": "zero3.json"}),
        "DeepSpeed",
        "config: shard.yaml",
    ),
    "offload": (
        recipe("sam", engine={"name": "fsdp2", "config": "offload.yaml"}),
        "offloaded",
        "config: shard.yaml",
    ),
    "ddp": (recipe("sam", engine={"name": "replicated"}), "DistributedDataParallel", "--gpus 1"),
    # of classes: a task that predicts tokens has no samples to compare
    "mmd": (
        load(
            "xnli_xlmr",
            ["engine=fsdp2", "train.micro_batch=4", "algorithm={name: tram_x, distance: mmd}"],
        ),
        "mmd",
        "algorithm.distance=kl",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_says_why_and_what_can(name: str) -> None:
    asked, why, way_out = REFUSED[name]
    refused = trace.refusal(asked, WORLD)
    assert refused is not None and "\n" not in refused
    assert why in refused and way_out in refused
    with pytest.raises(ValueError, match=why):
        trace.trace(asked, WORLD)


def test_the_formula_is_within_a_tenth_of_the_documented_traces() -> None:
    page = trace_table.DOCUMENT.read_text()
    cells = trace_table.lines(page)
    there = {(line.model, line.gpus, line.row) for line in cells}
    assert there >= {
        (model, gpus, row)
        for model in ("gpt2-xl", "llama3-8b", "70b")
        for gpus in (8, 64, 512)
        for row in ("base", "sam", "tram_prev")
    }
    for line in cells:
        assert line.planned == pytest.approx(line.traced, rel=0.1), line
    assert trace_table.drawn(page, cells) == page, "run python -m tests.bench.trace_table"


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_refuses_what_it_cannot_trace_before_it_plans(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another number of GPUs could be traced: one GPU with `replicated`."""
    asked, why, way_out = REFUSED[name]
    path = tmp_path / "traced.yaml"
    path.write_text(asked.model_dump_json(exclude_unset=True))
    assert tram.main(["plan", "--recipe", str(path), "--gpus", f"1,{WORLD}", "--trace"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and why in err and way_out in err and "without --trace" in err


def test_the_command_prints_the_trace_beside_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "traced.yaml"
    path.write_text(
        recipe("base", world=1, engine={"name": "replicated"}).model_dump_json(exclude_unset=True)
    )
    assert tram.main(["plan", "--recipe", str(path), "--gpus", "1", "--trace"]) == 0
    said = capsys.readouterr().out
    assert "base as one of 1 rank(s)" in said and "planned / traced" in said

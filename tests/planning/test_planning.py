"""The plan against real tensors on 2 ranks, against torch's FSDP2 memory tracker, and against known
models and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import ranks
from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.models.logit_chunks import CHUNK_ELEMENTS
from tram_ds.planning import cost, memory, model_states, plan, report, sizes
from tram_ds.planning.setup import setup_of
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT, MARK = ROOT / "docs" / "planning.md", "<!-- tables -->\n"
BASE = {
    "name": "planned",
    "task": {"name": "language_modeling", "data": "generated", "seq_len": 256},
    "optimizer": {"name": "adam", "lr": 1e-5},
    "engine": {"name": "fsdp2", "config": "shard.yaml"},
}


def recipe(
    model: dict,
    row: str | dict,
    world: int,
    rows: int,
    checkpointing: bool = False,
    logits: str = "chunks",
    micros: int = 1,
) -> Recipe:
    section = {
        "init": {"architecture": "gpt2", **model},
        "dropout": 0.0,
        "dtype": "bfloat16",
        "logits": logits,
    }
    train = {"steps": 1, "global_batch": rows * world * micros, "micro_batch": rows}
    section["activation_checkpointing"] = checkpointing
    return Recipe.model_validate({**BASE, "model": section, "algorithm": row, "train": train})


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("70b", 68_976_648_192),
    ],
)
def test_published_sizes(name, count):
    assert plan.published(name, 1, "base").size.parameters == count


def test_the_papers_gpt2xl_run_takes_the_hours_counted_by_hand():
    """10.29 GFLOP per token x 7/3 x 1.64e9 tokens on 4 A100 at 45 %: 19.5 h."""
    changed = ["train.micro_batch=4", "model.activation_checkpointing=true"]
    planned = plan.plan(load("m2d2_gpt2xl.yaml", changed), 4)
    assert planned.cost.hours(100_000, 4, 312, 0.45) == pytest.approx(19.5, rel=0.01)
    assert planned.cost.hardware_flops / planned.cost.model_flops == pytest.approx(9 / 7)
    base = plan.plan(load("m2d2_gpt2xl.yaml", changed), 4, "base").cost
    assert planned.cost.model_flops / base.model_flops == pytest.approx(7 / 3)
    assert base.hardware_flops / base.model_flops == pytest.approx(4 / 3)


def sent(engine: str, row: str, micros: int = 1, **options) -> float:
    """Bytes per parameter and step, in bf16 on 2 GPUs."""
    name = "zero" if engine.startswith("zero") else engine
    config = {"zero_optimization": {"stage": int(engine[-1])}} if name == "zero" else {}
    setup = setup_of(name, config, world=2, half=True, kept=2, micros=micros, checkpointing=False)
    size = sizes.size(recipe({"n_layer": 2, "n_embd": 64, "n_head": 2}, "base", 2, 1))
    found = cost.cost(setup, size, algorithm(row, **options)).sent
    return round(sum(found.values()) / size.parameters, 2)


def test_fsdp2_sends_18_bytes_per_parameter_for_tram_and_8_for_adam():
    planned = {row: plan.published("7b", 64, row) for row in ("base", "sam", "tram_x")}
    per_parameter = {
        row: sum(p.cost.sent.values()) / p.size.parameters for row, p in planned.items()
    }
    assert per_parameter == {"base": 8, "sam": 16, "tram_x": 18}


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_partitioned_weights_move_only_where_nothing_else_would_bring_them(engine):
    assert {
        row: sent(engine, row) for row in ("base", "sam", "tram_x", "tram_prev", "tram_init")
    } == {
        "base": 4,
        "sam": 8,
        "tram_x": 8,
        "tram_prev": 8,
        "tram_init": 12,
    }
    assert sent(engine, "tram_prev", lookahead=False) == 12
    assert sent(engine, "tram_x", micros=2, accumulation="micro") == 18


def test_rows_of_one_pass_cost_what_they_add_to_it():
    """theta + epsilon is one more gather where the working copy is apart; theta_0 is one more
    sharded copy, and nobody sends it."""
    assert [sent(e, "msam") - sent(e, "base") for e in ("zero1", "zero3", "fsdp2")] == [2, 0, 0]
    assert sent("zero1", "l2sp") == sent("zero1", "base")
    setup = setup_of("fsdp2", {}, world=2, half=False, kept=2, micros=1, checkpointing=False)
    size = sizes.size(recipe({"n_layer": 2, "n_embd": 64, "n_head": 2}, "base", 2, 1))
    held = {
        row: memory.peak(setup, size, algorithm(row)) for row in ("base", "l2sp", "kl_init", "msam")
    }
    shard = 4 * -(-size.parameters // 2)
    assert (held["base"].references, held["l2sp"].references) == (0, shard)
    assert held["l2sp"].logits == held["base"].logits < held["kl_init"].logits
    assert (held["base"].theta_snapshot, held["msam"].theta_snapshot) == (0, shard)


def test_random_weights_send_a_number_for_every_row():
    """Of GPT-2: the two embeddings' rows, and of a block c_attn, c_proj and c_fc, (in, out) with as
    many as its width, and the second c_proj with four times as many: 7 n_embd. float64, summed over
    those that share the weights."""
    tiny = {"n_layer": 3, "n_embd": 64, "n_head": 2, "vocab_size": 100}
    size = sizes.size(recipe(tiny, "base", 2, 1))
    assert size.trained_rows == 100 + 256 + 3 * 7 * 64
    shared = {"replicated": 0, "zero0": 0, "zero2": 1, "zero3": 1, "fsdp2": 1}
    for engine, counted in shared.items():
        name = "zero" if engine.startswith("zero") else engine
        config = {"zero_optimization": {"stage": int(engine[-1])}} if name == "zero" else {}
        setup = setup_of(name, config, world=2, half=False, kept=2, micros=1, checkpointing=False)
        rwp, msam = (cost.cost(setup, size, algorithm(row)).sent for row in ("rwp", "msam"))
        assert sum(rwp.values()) - sum(msam.values()) == counted * 8 * size.trained_rows, engine


def test_the_average_that_is_scored_is_one_more_copy():
    """Beside the average that training keeps. Where gradients are never given back and one block's
    activations are by far the largest part, that is the peak."""
    tiny = {"n_layer": 2, "n_embd": 64, "n_head": 2}
    large = {"saved_block": 1 << 30, "saved_rest": 0, "block_input": 0, "classes": 1}
    size = replace(sizes.size(recipe(tiny, "mesa", 2, 1)), **large)
    common = {"world": 2, "half": False, "kept": 2, "micros": 1, "checkpointing": True}
    found = {
        (row, average): memory.peak(
            setup_of("replicated", {}, average=average, **common), size, algorithm(row)
        )
        for row in ("mesa", "asam")
        for average in (False, True)
    }
    copy = 4 * size.parameters
    assert found["mesa", True].moment == "the scores of the average"
    assert found["mesa", True].references == 2 * copy
    assert found["mesa", False].moment == "the backward of the pass"
    assert found["asam", True] == found["asam", False]
    scored = load("quickstart.yaml", ["algorithm=mesa", "eval.weights=ema"])
    assert (
        plan.setup_for(scored, 2).average and not plan.setup_for(load("quickstart.yaml"), 2).average
    )


def test_a_save_in_the_background_keeps_what_the_step_replaces():
    """theta_{t-1} and an average are another copy through the passes; theta_0 is not replaced."""
    extra = {}
    for row in ("base", "asam", "tram_prev", "tram_init", "mesa", "asam_mesa"):
        beside = load("m2d2_gpt2xl.yaml", [f"algorithm={row}", "checkpoint.asynchronous=true"])
        plans = [plan.plan(load("m2d2_gpt2xl.yaml", [f"algorithm={row}"]), 8), plan.plan(beside, 8)]
        totals = [p.memory.total for p in plans]
        copy = model_states.fp32_shard(plans[0].setup, plans[0].size)
        extra[row] = (totals[1] - totals[0]) / copy
    assert extra["base"] == extra["asam"] == extra["tram_init"] == 0
    assert extra["tram_prev"] == extra["mesa"] == extra["asam_mesa"] == 1


@pytest.mark.parametrize("logits", ["whole", "chunks"])
def test_a_stored_loss_gradient_takes_what_it_is_or_is_made_from(logits):
    """Of each of 3 micro-batches the logits once more; or hidden states, one head for all and,
    while one is differentiated, a chunk of logits of theta, which is a product more a step."""
    tiny = {"n_layer": 2, "n_embd": 64, "n_head": 2}
    size = sizes.size(recipe(tiny, "base", 2, 1, logits=logits))
    setup = setup_of("fsdp2", {}, world=2, half=False, kept=2, micros=3, checkpointing=False)
    rows = [algorithm(name) for name in ("sam", "functional_sam")]
    before, held = (memory.peak(setup, size, row) for row in rows)
    assert before.moment == held.moment == "the loss of pass 2"
    at_theta, of_all = (cost.cost(setup, size, row) for row in rows)
    assert (of_all.sent, of_all.model_flops) == (at_theta.sent, at_theta.model_flops)
    again = of_all.hardware_flops - at_theta.hardware_flops
    whole, states = size.positions * size.classes, size.positions * size.width
    head = size.classes * size.width
    if logits == "whole":
        assert held.logits - before.logits == 3 * 4 * whole
        assert (held.references, again) == (0, 0)
    else:
        chunk = min(CHUNK_ELEMENTS["cuda"], whole)
        assert held.logits - before.logits == 3 * 4 * states + 4 * chunk
        assert held.references == 4 * head
        assert again == 3 * 2 * 2 * size.positions * head


def test_looking_ahead_gathers_as_any_forward_pass_does():
    assert (
        sent("fsdp2", "tram_prev")
        == sent("fsdp2", "tram_prev", lookahead=False)
        == sent("fsdp2", "tram_x")
        == 18
    )
    # where a GPU can keep the parameters from one pass to the next
    assert sent("zero3", "tram_prev") == 8
    assert sent("zero3", "tram_prev", lookahead=False) == 10


def test_cheaper_variants_are_counted_as_their_mean_step():
    assert sent("zero1", "tram_prev", perturb_every=4) == 5
    assert sent("fsdp2", "tram_init", perturb_every=3) == 11.33
    assert (sent("replicated", "sam"), sent("replicated", "sam", perturbation_scope="rank")) == (
        8,
        4,
    )
    units = [
        plan.plan(recipe({"n_layer": 2, "n_embd": 64, "n_head": 2}, row, 1, 1), 1).cost.units
        for row in (
            {"name": "tram_x", "perturb_every": 4},
            {"name": "asam_trpo", "perturb_every": 4},
        )
    ]
    assert units == [4, 4.75]  # 7 and 3 x 3; 7 and 3 x 4


TRACKED = [  # world, row, checkpointing, rows, vocabulary, logits
    (64, "sam", 1, 1, 8192, "whole"),
    (8, "tram_prev", 1, 8, 8192, "whole"),
    (8, "tram_prev", 1, 8, 8192, "chunks"),
    (8, "tram_prev", 1, 8, 50257, "chunks"),
    (2, "sam", 1, 1, 50257, "chunks"),
]


@pytest.mark.parametrize(("world", "row", "checkpointing", "rows", "vocabulary", "logits"), TRACKED)
def test_fsdp2_peaks_as_torchs_tracker_has_them(
    world, row, checkpointing, rows, vocabulary, logits
):
    from tests.planning.planning_tracker import MODEL

    arguments = [str(x) for x in (world, row, checkpointing, rows, vocabulary, logits)]
    tracked = ranks.run("tests.planning.planning_tracker", *arguments, world=1)
    model = {**MODEL, "vocab_size": vocabulary}
    planned = plan.plan(recipe(model, row, world, rows, bool(checkpointing), logits), world).memory
    assert planned.masters == pytest.approx(tracked["_FSDPRefType.SHARDED_PARAM"], rel=0.01)
    assert planned.moments == pytest.approx(tracked["_FSDPRefType.OPT"], rel=0.01)
    assert planned.total == pytest.approx(tracked["Total"], rel=0.1), planned


def test_whole_logits_and_no_look_ahead_are_planned_as_the_recipe_has_them():
    def planned(logits: str = "chunks", micros: int = 1, **options) -> memory.Memory:
        model = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 50257, "n_positions": 256}
        big = recipe(model, {"name": "tram_prev", **options}, 8, 16, False, logits, micros)
        return plan.plan(big, 8).memory

    assert planned("whole").total > 2 * planned().total
    head, rows = 2 * 50257 * 64, 2 * 16 * 256 * 64
    assert planned().references - planned(lookahead=False).references == head
    # the step after one that climbs asks for no prediction
    assert planned(perturb_every=2).references == head
    assert planned(micros=3).logits - planned(micros=2).logits == 2 * rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "config", "row", "each"),
    [
        ("fsdp2", "shard.yaml", "tram_prev", 0),
        ("fsdp2", "offload.yaml", "base", 4 + 8 + 4),  # theta, Adam's moments, the gradient
        ("fsdp2", "offload.yaml", "tram_prev", 4 + 8 + 4 + 4 + 4),  # the snapshot, theta_{t-1}
        ("zero", "zero3_offload.json", "base", 4 + 8 + 4 + 2),  # and the working copy, in bf16
    ],
)
def test_what_is_offloaded_is_planned_on_the_host(engine, config, row, each):
    asked = recipe({"n_layer": 2, "n_head": 2, "n_embd": 64}, row, 4, 1)
    section = {"name": engine, "config": config}
    words = {**asked.model_dump(exclude_unset=True), "engine": section}
    found = plan.plan(Recipe.model_validate(words), 4)
    assert found.host.offloaded == each * found.size.parameters // 4


def test_states_are_what_two_ranks_hold():
    found = ranks.run("tests.planning.planning_ranks")
    model = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 32}
    tiny, row = recipe(model, "tram_prev", 2, 1), algorithm("tram_prev")
    size = sizes.size(
        tiny.model_copy(update={"task": tiny.task.model_copy(update={"seq_len": 32})})
    )
    for engine, real in found.items():
        name = "zero" if engine.startswith("zero") else {"ddp": "replicated"}.get(engine, engine)
        config = {"zero_optimization": {"stage": int(engine[-1])}} if name == "zero" else {}
        common = {"world": 2, "half": True, "kept": 2, "micros": 1, "checkpointing": False}
        setup = setup_of(name, config, background=True, **common)
        seen = model_states.references(setup, size, row)
        planned = {
            **model_states.states(setup, size, row),
            "predictions": seen.heads + seen.rows,
            "previous": seen.previous,
            "saved": seen.saved,
        }
        # theta_{t-1}, during the passes
        assert real.pop("weights") == real.pop("saved at once") == 0, engine
        for part, bytes_ in real.items():
            assert planned[part] == pytest.approx(bytes_, rel=0.1), (engine, part)


@pytest.mark.parametrize("world", [1, 4096])
def test_every_algorithm_at_the_ends_of_the_range(world):
    plans = plan.every_algorithm(
        recipe({"n_layer": 2, "n_embd": 64, "n_head": 2}, "tram_x", world, 1), world
    )
    assert [p.algorithm for p in plans] == list(ALGORITHMS)
    assert all(p.memory.total > 0 and p.cost.units >= 3 for p in plans)


def test_more_gpus_need_less_each_and_replicas_do_not_share():
    xl = [plan.published("gpt2-xl", world, "tram_prev").memory.states for world in (1, 4, 64)]
    assert xl == sorted(xl, reverse=True)
    ddp = [
        load("m2d2_gpt2xl.yaml", ["engine=replicated", f"train.global_batch={2 * world}"])
        for world in (1, 4)
    ]
    one, four = (plan.rank_bytes(r, world) for r, world in zip(ddp, (1, 4), strict=True))
    assert four >= one


def test_shipped_recipes_can_be_planned_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        # their models are made here first: by quickstart_pretrain, by docs/evidence.md's command
        if path.stem not in ("quickstart", "xnli_e5"):
            assert plan.plan(load(path.name), 1).memory.total > 0


def test_advice_fits_and_names_the_cheapest_key():
    big = load("m2d2_s2orc_gpt2.yaml")
    planned = plan.plan(big, 4).memory.total
    assert (
        plan.advice(big, 4, planned / plan.USABLE * 0.9) == "cheapest change: train.micro_batch=2"
    )
    assert plan.advice(big, 4, 1e6).startswith("no key")
    small = recipe({"n_layer": 2, "n_embd": 64, "n_head": 2}, "tram_x", 8, 1)
    assert (
        plan.advice(small, 8, plan.plan(small, 8).memory.total / plan.USABLE - 1e5)
        == "cheapest change: model.activation_checkpointing=true"
    )


def test_launch_plan(tmp_path):
    def plan_(*arguments):
        words = ("--recipe", "m2d2_gpt2xl.yaml", *arguments)
        return ranks.script(ROOT / "launch/plan.py", *words, cwd=tmp_path)

    done = plan_("--gpus", "2,4", "--gpu-memory", "80")
    assert done.returncode == 0 and done.stdout.count("assumed: ") == 2 and "fits" in done.stdout
    # GPT2-XL: 4 N / W and its embedding; 4 N where it is whole
    whole, embedding = 4 * 1_557_611_200 / 1e9, 4 * 50257 * 1600 / 1e9
    for world in (2, 4):
        assert f"host memory: at most {whole / world + embedding:.1f} GB for each" in done.stdout
    assert done.stdout.count(f"; {whole:.1f} GB where transformers merges") == 2
    done = plan_("--gpus", "4", "--gpu-memory", "10")
    assert done.returncode == 1 and "does not fit; cheapest change" in done.stdout
    for arguments, message in (
        (["--gpus", "0"], "1 to 4096"),
        (["--gpus", "4", "--mfu", "1.2"], "at most 1"),
    ):
        done = plan_(*arguments)
        assert done.returncode == 2 and message in done.stderr


def test_mfu_above_one_is_refused():
    with pytest.raises(ValueError, match="at most 1"):
        cost.Cost(3, 1.0, 1.0, {}).hours(1, 1, 312, 1.01)


def test_the_documented_tables_are_the_plans():
    """To update: python -m tests.planning.test_planning"""
    assert report.document() in DOCUMENT.read_text()


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text[: text.index(MARK) + len(MARK)] + report.document())

"""One model on one engine, looked at in one job: python -m tram_ds.verification.worker OUT CASE,
CASE a steps.Case as JSON. Self-check, realised epsilon, peaks beside the plan's, times, MFU, and
where a step's time goes."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tram_ds.algorithms.bound import algorithm
from tram_ds.algorithms.probe import EpsilonProbe
from tram_ds.algorithms.self_check import self_check
from tram_ds.algorithms.step import StepReport
from tram_ds.algorithms.stepper import Stepper
from tram_ds.bench.measure import clock, turns
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Span
from tram_ds.models.pretrained import load_stored
from tram_ds.models.randomness import StepRandomness
from tram_ds.planning.outline import CONFIGS
from tram_ds.planning.plan import Plan, plan
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime.exits import NumericError
from tram_ds.runtime.ranks import Job, barrier, detect, highest, joined, threads_per_rank
from tram_ds.tasks import causal
from tram_ds.training.build import build_engine
from tram_ds.training.throughput import throughput
from tram_ds.verification.steps import ENGINES, ROWS, Case
from tram_ds.verification.trace import summary, traced

TINY = {"architecture": "gpt2", "n_layer": 1, "n_embd": 128, "n_head": 2, "vocab_size": 512}
SIZES = {**CONFIGS, "tiny": TINY}  # the recipe's model.init
# Of TRAM's rows a radius of this size: the distance of a model that has learned nothing may be so
# small that no more than a few weights of the working copy move, which says little about all.
RELATIVE = {"radius": "relative", "rho": 0.5}
PROBED = {"sam": {}, "tram_x": RELATIVE, "tram_prev": RELATIVE}
SPREAD = 0.1  # of what is added to biases and weights of norms, which start at exactly 0 and 1


def recipe_of(case: Case, world: int) -> Recipe:
    """What `tram train` would be given: bf16, AdamW, no recomputation, the engine's shipped
    config."""
    return Recipe.model_validate(
        {
            "name": "verify",
            "task": {"name": "language_modeling", "data": "generated", "seq_len": case.tokens},
            "model": {"init": SIZES[case.size], "dtype": "bfloat16"},
            "algorithm": "base",
            "optimizer": {"name": "adamw", "lr": 1e-4},
            "engine": ENGINES[case.engine],
            "train": {
                "steps": 1000,
                "global_batch": case.rows * world,
                "micro_batch": case.rows,
            },
        }
    )


@dataclass(frozen=True)
class Bench:
    """An engine that all algorithms share in turn, its forward pass and a batch of this rank."""

    recipe: Recipe
    engine: Engine
    forward: Any
    batch: dict[str, Tensor]

    def stepper(self, row: str) -> Stepper:
        """With nothing remembered."""
        return Stepper(self.engine, algorithm(row))

    def step(self, stepper: Stepper, ahead: bool = True, probe: Any = None) -> StepReport:
        """ahead: the next batch is at hand, as it is but for the step before a checkpoint."""
        upcoming = [self.batch] if ahead else None
        return stepper.step([self.batch], self.forward, causal.counts, probe, upcoming)


def measured(case: Case, job: Job) -> dict[str, Any]:
    """All that is known of one case; `unfit` and nothing else where the plan says that it needs
    more memory than there is. Collective."""
    recipe = recipe_of(case, job.world_size)
    plans = {row: plan(recipe, job.world_size, row) for row in ROWS}
    if text := unfit(plans, job.device):
        return {"unfit": text}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with joined(job, recipe.engine.name):
        bench = built(case, recipe, job)
        rows = {row: looked_at(bench, row, plans[row]) for row in ROWS}
        for row in PROBED:
            rows[row] |= probed(bench, row)
        for row, seconds in timed(bench, case.rounds).items():
            rows[row]["seconds"] = seconds
        for row in ("base", ROWS[-1]):
            rows[row] |= rates(bench, row, case.rounds)
        trace = where_it_went(bench, ROWS[-1])
        barrier()  # NCCL is not taken apart while rank 0 is still at its trace
        size = {"parameters": plans["base"].size.parameters, "tokens": case.rows * case.tokens}
        return {**size, "rows": rows, "trace": trace}


def unfit(plans: dict[str, Plan], device: torch.device) -> str:
    """Why not to begin; nothing on a CPU, whose memory is not what is planned."""
    if device.type != "cuda":
        return ""
    memory = torch.cuda.get_device_properties(device).total_memory
    largest = max(plans.values(), key=lambda found: found.memory.total)
    if largest.fits(memory):
        return ""
    needed = f"{largest.algorithm} is planned at {largest.memory.total / 1e9:.1f} GB"
    return f"{needed}, the GPU has {memory / 1e9:.1f} GB"


def built(case: Case, recipe: Recipe, job: Job) -> Bench:
    """The recipe's engine around a fresh model, as `tram train` builds it. Collective."""
    torch.set_num_threads(threads_per_rank(job))
    model = load_stored(AutoModelForCausalLM, recipe.model, max_position_embeddings=case.tokens)
    name, steps = recipe.engine.name, recipe.train.steps or 1
    # no row of ROWS has a gradient through two forward passes
    engine = build_engine(recipe, name, model, job, 1, steps, one_backward=True)
    generator = torch.Generator().manual_seed(1 + job.rank)
    vocabulary = engine.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (case.rows, case.tokens), generator=generator)
    forward = causal.chunked(engine.module, recipe.model)
    assert forward is not None, "GPT-2's head is known"
    spread(engine)
    return Bench(recipe, engine, forward, {"input_ids": ids.to(job.device)})


def spread(engine: Engine) -> None:
    """Vectors as training leaves them, no two elements alike: the bf16 neighbours of exactly 1 are
    too far for an epsilon below half of that distance, on all of them at once. Collective."""
    draws = StepRandomness(seed=0, step=0)

    def moved(span: Span, theta: Tensor) -> Tensor:
        if len(span.shape) != 1:
            return theta
        return theta + SPREAD * draws.weights(span.name, span.start, theta)

    engine.load(engine.params(keep=True).map(moved), engine.moments(), engine.steps)


def looked_at(bench: Bench, row: str, planned: Plan) -> dict[str, Any]:
    """One algorithm alone on the engine: its self-check, and its peak in steps that look ahead and
    in one that cannot. Collective."""
    stepper, device = bench.stepper(row), bench.engine.device
    found: dict[str, Any] = {"planned": planned.memory.total, "moment": planned.memory.moment}
    if row == "base":  # the optimizer's moments come with the first step, before any self-check
        bench.step(stepper)
    else:
        problem: list[str] = []
        found["self_check_peak"] = peak_of(device, lambda: checked(bench, stepper, problem))
        found["self_check"] = problem

    def steps() -> None:
        for ahead in (True, True, False, True):
            bench.step(stepper, ahead)

    return found | {"peak": peak_of(device, steps)}


def probed(bench: Bench, row: str) -> dict[str, Any]:
    """What epsilon became in the bf16 working copy. Collective."""
    stepper = Stepper(bench.engine, algorithm(row, **PROBED[row]))
    for _ in range(2):  # theta_{t-1} is theta_t in the first step
        bench.step(stepper)
    probe = EpsilonProbe(True, stepper.algorithm.epsilon_length)
    radius = float(bench.step(stepper, probe=probe).radius)
    return {"radius": radius, "probe": {key: float(x) for key, x in probe.values.items()}}


def checked(bench: Bench, stepper: Stepper, problem: list[str]) -> None:
    """The self-check of a run's start; what it finds goes to `problem`, on every rank alike."""
    try:
        self_check(stepper, [bench.batch], bench.forward)
    except NumericError as error:
        problem.append(str(error))


def peak_of(device: torch.device, action: Callable[[], object]) -> int | None:
    """Bytes of tensors at the peak of `action`, of the rank that has most; None on a CPU.
    Collective."""
    if device.type != "cuda":
        action()
        return None
    # what cycles hold of the row before would count as this one's
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return highest(torch.cuda.max_memory_allocated(device))


def timed(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of each algorithm's steps, which take turns. A step ends when the whole device is
    idle: an event of one stream would not wait for the others'. Collective."""
    steppers = {row: bench.stepper(row) for row in ROWS}
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for round_, row in turns(ROWS, rounds):
        start = clock(bench.engine.device)
        bench.step(steppers[row])
        # turns() begins with one round more, to warm up
        if round_:
            found[row].append(clock(bench.engine.device) - start)
    return found


def rates(bench: Bench, row: str, steps: int) -> dict[str, float]:
    """tokens_per_second and, where the device's peak is known, mfu, as a run records them.
    Collective."""
    stepper = bench.stepper(row)
    bench.step(stepper)
    measuring = throughput(bench.recipe, stepper)
    measuring.count(stepper, bench.forward, [bench.batch])
    clock(bench.engine.device)  # nothing of the count is left to do
    measuring.restart()
    for step in range(steps):
        measuring.add(step, bench.step(stepper).targets)
    clock(bench.engine.device)
    return measuring.rates()


def where_it_went(bench: Bench, row: str) -> dict[str, Any] | None:
    """trace.summary of one step on rank 0, or {"failed": why} where the machine lets nobody look;
    the others take it too. Collective."""
    stepper = bench.stepper(row)
    for _ in range(2):
        bench.step(stepper)
    if bench.engine.rank:
        bench.step(stepper)
        return None
    taken: list[StepReport] = []
    try:
        events = traced(lambda: taken.append(bench.step(stepper)), bench.engine.device)
        return summary(events)
    except (AssertionError, OSError, RuntimeError) as error:
        if not taken:
            bench.step(stepper)  # the other ranks are in it
        return {"failed": str(error)}


def main(out: str, case: str) -> None:
    """Rank 0 writes OUT."""
    found = measured(Case(**json.loads(case)), detect())
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # threads of DeepSpeed's and gloo's can abort the interpreter's own way out, after all is done
    os._exit(0)

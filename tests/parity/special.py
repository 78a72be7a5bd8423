"""`python -m tests.parity.special OUT ANSWERS ENGINE`: what an engine must do beyond the equations,
in one process group. ANSWERS: the folder of what the oracle says."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from tests.parity import build, mutants, plain, problem
from tests.parity.answers import kept_in
from tests.parity.reference import Oracle
from tests.parity.worker import compare, relative_error
from tram_ds.algorithms.effect import measure
from tram_ds.algorithms.probe import EpsilonProbe
from tram_ds.models.output import Output


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def mutant_errors(engine: str, run: Callable[..., dict]) -> dict[str, float]:
    """run: compare() but for the engine's and the row's arguments."""
    errors = {
        name: run(engine, "tram_prev", 2, mutate=mutants.MUTANTS[name])["theta"]
        for name in mutants.ENGINES[engine]
    }
    errors["no_gradient_in_epsilon"] = run(engine, "tram_prev", 2, **mutants.NO_GRADIENT)["theta"]
    if engine in mutants.ROW_ENGINES:
        for name, (row, mutate) in mutants.OF_ROWS.items():
            options = mutants.ROW_OPTIONS.get(name, {})
            errors[name] = run(engine, row, 2, mutate=mutate, **options)["theta"]
    errors["none"] = run(engine, "tram_prev", 2)["theta"]
    return errors


def batches_of(step: int, rank: int, micros: int = 2) -> list[dict[str, torch.Tensor]]:
    return [problem.batch(step, rank * micros + k) for k in range(micros)]


class Explode(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * float("inf")


def poisoned(kind: str, rank: int) -> Any:
    """problem.forward that goes wrong on rank 1 (or the only rank) in pass 1 or pass 2 of a step,
    and how many calls it saw."""
    calls = {"n": 0}

    def forward(model: Any, batch: Any) -> Output:
        out = problem.forward(model, batch)
        if torch.is_grad_enabled():
            calls["n"] += 1
        hit = rank == (1 if dist.is_initialized() and dist.get_world_size() > 1 else 0)
        second = calls["n"] > 2
        if hit and kind == "nan_loss_pass_1" and torch.is_grad_enabled() and not second:
            return Output(out.loss_sum * float("nan"), out.count, out.logits, out.rows)
        if hit and kind == "nan_loss_pass_2" and second:
            return Output(out.loss_sum * float("nan"), out.count, out.logits, out.rows)
        if hit and kind == "inf_gradient" and torch.is_grad_enabled() and not second:
            return Output(Explode.apply(out.loss_sum), out.count, out.logits)
        if hit and kind == "nan_distance" and not torch.is_grad_enabled():
            return Output(out.loss_sum, out.count, out.logits * float("nan"), out.rows)
        return out

    return forward


def nonfinite(engine: str, rank: int) -> dict[str, Any]:
    """A bad step is skipped on every rank, leaves weights and moments bit for bit, and the next one
    is taken."""
    rows = {}
    for kind in ("nan_loss_pass_1", "nan_loss_pass_2", "inf_gradient", "nan_distance"):
        built = build.stepper(
            engine, problem.model(), "tram_prev", 2, optimizer=adamw, radius_scale=20.0
        )
        built.step(batches_of(0, rank), problem.forward)
        before, moments = (
            built.engine.params().clone(),
            {k: v.clone() for k, v in built.engine.moments().items()},
        )
        report = built.step(batches_of(1, rank), poisoned(kind, rank))
        same = built.engine.params().equal(before) and all(
            v.equal(moments[k]) for k, v in built.engine.moments().items()
        )
        after = built.step(batches_of(2, rank), problem.forward)
        rows[kind] = {
            "skipped_everywhere": build.gather(float(not report.skipped)) == 0.0,
            "unchanged_everywhere": build.gather(float(not same)) == 0.0,
            "has_moments": len(moments) == 2,
            "next_step_taken": not after.skipped and math.isfinite(float(after.loss)),
        }
        build.stop(built)
    return rows


def wide_model() -> GPT2LMHeadModel:
    """0.84 M parameters: the stated size of the bf16 checks."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            bos_token_id=0,
            eos_token_id=0,
            n_positions=32,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def wide_forward(model: Any, ids: torch.Tensor) -> Output:
    logits = model(input_ids=ids).logits.float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return Output(loss, ids[:, 1:].numel(), logits.flatten(0, 1))


def bf16(engine: str, rank: int) -> dict[str, Any]:
    """A bf16 working copy over fp32 masters: what epsilon becomes in it, and whether theta comes
    back."""
    rows = {}
    ids = [
        torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(10 * rank + k))
        for k in range(2)
    ]
    for algorithm in ("sam", "asam"):
        built = build.stepper(engine, wide_model(), algorithm, 2, dtype=torch.bfloat16)
        probe, state = EpsilonProbe(), {}

        def watch(e: Any, epsilon: Any, probe: Any = probe, state: dict = state) -> None:
            probe(e, epsilon)
            state["moved"] = not state["working"].equal(e.working())

        state["working"], theta = built.engine.working().realise(), built.engine.params().clone()
        descend, result = built.engine.descend, {}

        def refused(finite: Any, *rest: Any, descend: Any = descend) -> Any:
            # a step not taken: theta must be what forward reads again
            return descend(torch.zeros_like(finite), *rest)

        built.engine.descend = refused
        report = built.step(ids, wide_forward, probe=watch)
        back = state["working"].equal(built.engine.working()) and built.engine.params().equal(theta)
        result["restored"] = report.skipped and build.gather(float(not back)) == 0.0
        values = {key: float(value) for key, value in probe.values.items()}
        rows[algorithm] = {
            **result,
            **values,
            "moved": state["moved"],
            "gap": float(report.perturbed_loss - report.loss),
        }
        build.stop(built)
    return rows


def moves_what_is_read(engine: str, rank: int) -> float:
    """Largest logit error of a forward pass at 1.1 theta that follows no-grad forwards at theta
    (gathered copies are stale)."""
    plain = problem.model()
    built = build.stepper(engine, problem.model(), "sam", 1)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.1)
        batch = problem.batch(0, 0)
        want = problem.forward(plain, batch).logits
        problem.forward(built.engine.model, batch)
        problem.forward(built.engine.model, batch)
        with built.engine.moved(to=built.engine.params() * 1.1):
            got = problem.forward(built.engine.model, batch).logits
    error = build.gather(float((got - want).abs().max()))
    build.stop(built)
    return error


def restored_after_an_exception(engine: str, rank: int) -> bool:
    built = build.stepper(engine, problem.model(), "sam", 1)
    before, theta = built.engine.working().realise(), built.engine.params().clone()
    try:
        with built.engine.moved(to=built.engine.params() * 1.5):
            raise KeyError("in pass 2")
    except KeyError:
        pass
    same = before.equal(built.engine.working()) and built.engine.params().equal(theta)
    build.stop(built)
    return build.gather(float(not same)) == 0.0


def tied_weights_once(engine: str, rank: int) -> float:
    """| |theta| over the engine - |theta| over unique parameters |."""
    model = problem.model()
    want = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    built = build.stepper(engine, model, "sam", 1)
    got = float(built.engine.norm(built.engine.params()))
    build.stop(built)
    return abs(got - want)


def micro_equals_global(engine: str, rank: int) -> float:
    """With one micro-batch per rank, an epsilon per micro-batch is the epsilon of the global batch:
    largest difference."""
    found = []
    for accumulation in ("global", "micro"):
        built = build.stepper(engine, problem.model(), "asam", 1, accumulation=accumulation)
        for step in range(2):
            built.step(batches_of(step, rank, 1), problem.forward)
        found.append(built.engine.params().clone())
        build.stop(built)
    return build.gather(
        max(
            (float((a - b).abs().max()) for a, b in zip(*found, strict=True) if a.numel()),
            default=0.0,
        )
    )


def an_epsilon_per_rank(rank: int) -> float:
    """DDP with `perturbation_scope: rank` against one process with an epsilon per micro-batch:
    largest difference of theta."""
    options = {"algorithm": "tram_x", "radius_scale": 25.0}
    ranks = build.stepper("ddp", problem.model(), micros=1, perturbation_scope="rank", **options)
    alone = build.stepper("single", problem.model(), micros=2, accumulation="micro", **options)
    for step in range(3):
        ranks.step(batches_of(step, rank, 1), problem.forward)
        alone.step([problem.batch(step, k) for k in range(2)], problem.forward)
    pairs = zip(ranks.engine.params(), alone.engine.params(), strict=True)
    return build.gather(max(float((a - b).abs().max()) for a, b in pairs))


def plainly(engine: str, rank: int) -> dict[str, float]:
    """Largest |theta - theta'| / max|theta| after 3 steps, theta' by the same step without one
    optimisation."""

    def after(form: str | None, dtype: torch.dtype) -> Any:
        built = build.stepper(
            engine, problem.model(), "tram_prev", 2, dtype=dtype, radius_scale=20.0
        )
        with plain.FORMS[form](built) if form else nullcontext():
            for step in range(3):
                built.step(batches_of(step, rank), problem.forward)
        theta = built.engine.params().clone()
        build.stop(built)
        return theta

    def apart(a: Any, b: Any) -> float:
        found = [
            float((x - y).abs().max() / x.abs().max())
            for x, y in zip(a, b, strict=True)
            if x.numel()
        ]
        return build.gather(max(found, default=0.0))

    default = {dtype: after(None, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {
        form: apart(default[dtype], after(form, dtype)) for form, dtype in plain.PRECISION.items()
    }


def effect(engine: str, rank: int, world: int) -> dict[str, float]:
    """The effect of tram_prev's second step, beside the float64 oracle's: absolute differences; and
    the error of theta after that step, which must not know that it was looked at."""
    model = problem.model()
    double = problem.double(model)
    oracle = Oracle(
        double,
        problem.forward,
        "tram_prev",
        lr=problem.LR,
        seed=problem.SEED,
        embedding=double.get_input_embeddings(),
        radius_scale=20.0,
    )
    built = build.stepper(engine, model, "tram_prev", 2, radius_scale=20.0)
    oracle.step(problem.global_batches(micros=2 * world)[0])
    built.step(batches_of(0, rank), problem.forward)
    batches = problem.global_batches(micros=2 * world)[1]
    g, loss, d = oracle.gradient(oracle.theta, batches)
    epsilon = oracle.epsilon(g, batches, 20.0 * d)
    moved = {n: p + epsilon[n] for n, p in oracle.theta.items()}
    h, perturbed, _ = oracle.gradient(moved, batches)
    flat = lambda x: torch.cat([v.flatten() for v in x.values()])  # noqa: E731
    want = {
        "change": (flat(h) - flat(g)).norm() / flat(g).norm(),
        "cosine": F.cosine_similarity(flat(h), flat(g), 0),
        "norm": flat(epsilon).norm(),
        "loss_gap": perturbed - loss,
        "radius": 20.0 * d,
        "masks": 0.0,
    }
    mine = measure(built, batches_of(1, rank), problem.forward, problem.counts)
    found = {key: abs(getattr(mine, key) - float(value)) for key, value in want.items()}
    oracle.step(batches)
    built.step(batches_of(1, rank), problem.forward)
    error = relative_error(built, oracle.theta)
    build.stop(built)
    return {**found, "theta": error, "large": float(want["change"])}


def main(out: str, kept: str, engine: str) -> None:
    rank, world = build.start(engine)
    rows: dict[str, Any] = {
        "nonfinite": nonfinite(engine, rank),
        "stale": moves_what_is_read(engine, rank),
        "exception": restored_after_an_exception(engine, rank),
        "micro": micro_equals_global(engine, rank),
        "tied": tied_weights_once(engine, rank),
        "plain": plainly(engine, rank),
        "effect": effect(engine, rank, world),
    }
    if engine == "ddp":
        rows["per_rank"] = an_epsilon_per_rank(rank)
    if engine.startswith("fsdp2"):
        try:
            build.stepper(engine, problem.model(), "sam", 1, perturbation_scope="rank")
        except ValueError as error:
            rows["per_rank_refused"] = str(error)
    if engine not in ("single", "ddp"):
        rows["bf16"] = bf16(engine, rank)
    if engine in mutants.ENGINES:
        run = functools.partial(compare, rank=rank, world=world, ask=kept_in(Path(kept)))
        rows["mutants"] = mutant_errors(engine, run)
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

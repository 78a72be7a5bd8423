"""Engines that are wrong the way real SAM implementations are, and rows that leave out what they
are for. Each takes a correct Stepper and breaks one thing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tram_ds.algorithms.ascent import sam
from tram_ds.algorithms.shift import AlongMomentum
from tram_ds.algorithms.stepper import Stepper
from tram_ds.engines import norms
from tram_ds.engines import protocol as base


def norm_not_reduced(built: Stepper) -> None:
    """The squared norm that rides on a pass's reduction stays this rank's own."""
    data_sum = built.engine.data_sum

    def all_but_the_norm(x: Any) -> Any:
        return torch.cat([data_sum(x)[:4], x[4:]]) if x.shape == (5,) else data_sum(x)

    built.engine.data_sum = all_but_the_norm


def epsilon_not_published(built: Stepper) -> None:
    @contextmanager
    def nowhere(to: Any):
        yield

    real = built.engine.moved

    # the reference's move stays right: only the ascent's is lost
    def moved(to: Any, until_descent: bool = False):
        return nowhere(to) if until_descent else real(to)

    built.engine.moved = moved


def second_gradient_added_to_first(built: Stepper) -> None:
    clear, calls = built.engine.clear, iter(range(10**6))
    # pass 1, pass 2, after the step
    built.engine.clear = lambda: None if next(calls) % 3 == 1 else clear()


def radius_per_rank(built: Stepper) -> None:
    region = built.algorithm.radius
    mean = region.mean
    region.mean = lambda engine, means: mean(engine, means) * (1.0 + engine.rank)


def reference_one_step_early(built: Stepper) -> None:
    descend, reference = built.engine.descend, built.algorithm.radius.reference

    def then_remember(*found: Any) -> Any:
        info = descend(*found)
        reference.weights = built.engine.params().clone()
        return info

    built.engine.descend = then_remember


def reference_one_step_stale(built: Stepper) -> None:
    reference, older = built.algorithm.radius.reference, []
    advance = reference.advance

    def late(engine: Any) -> None:
        advance(engine)
        older.append(reference.weights.clone())
        reference.weights = older[max(0, len(older) - 2)]

    reference.advance = late


def restored_by_bf16_subtraction(built: Stepper) -> None:
    engine: Any = built.engine

    @contextmanager
    def moved(to: Any, until_descent: bool = False):
        theta, to = engine.params(), to.realise()
        epsilon = to - theta
        engine._write(to)
        try:
            yield
        finally:
            engine._write(
                to.map(lambda _, t: t.bfloat16()) - epsilon.map(lambda _, t: t.bfloat16())
            )

    engine.moved = moved


def mean_of_means(built: Stepper) -> None:
    engine: Any = built.engine

    def backward(
        batches: Any, objective: Any, norm_rule: Any = None, local_only: bool = False
    ) -> base.PassMeans:
        engine.clear()
        sums = torch.zeros(4, dtype=torch.float64)
        for i, batch in enumerate(batches):
            engine.weights.ahead(i == len(batches) - 1, local_only)
            terms = objective(i, batch)
            engine.backward_one(terms.objective / float(terms.sums[1]) / len(batches))
            sums += terms.sums
        engine.targets = torch.ones((), dtype=torch.float64)
        squares = norms.squared_norm(
            engine.weights.gradient(), engine.params, norm_rule, engine.device
        )
        squares = squares / engine.replicas
        means = base.PassMeans.of(engine.data_sum(torch.cat([sums, squares[None]])))
        return replace(means, norm=means.norm * means.targets)

    engine.backward = backward


MUTANTS: dict[str, Callable[[Stepper], None]] = {
    f.__name__: f
    for f in (
        norm_not_reduced,
        epsilon_not_published,
        second_gradient_added_to_first,
        radius_per_rank,
        reference_one_step_early,
        reference_one_step_stale,
        restored_by_bf16_subtraction,
        mean_of_means,
    )
}


def anchor_goes_along(built: Stepper) -> None:
    built.algorithm.anchor.before = lambda w, engine: engine.params(keep=True)


def moved_the_other_way(built: Stepper) -> None:
    built.algorithm = replace(built.algorithm, shift=AlongMomentum(-0.5))


def noise_of_another_step(built: Stepper) -> None:
    shift = built.algorithm.shift
    built.algorithm = replace(
        built.algorithm, shift=lambda engine, draws: shift(engine, replace(draws, step=0))
    )


def clean_descent(built: Stepper) -> None:
    built.algorithm = replace(built.algorithm, descent=None)


def loss_gradient_at_epsilon(built: Stepper) -> None:
    built.algorithm = replace(built.algorithm, stored_gradient=False)


def not_preconditioned(built: Stepper) -> None:
    built.algorithm = replace(built.algorithm, ascent=sam())


def moments_without_a_past(built: Stepper) -> None:
    moments = built.engine.moments
    built.engine.moments = lambda: {key: x * 0.0 for key, x in moments().items()}


# of other rows: (row, mutant), run where masters and working copy are one and apart
OF_ROWS: dict[str, tuple[str, Callable[[Stepper], None]]] = {
    "anchor_goes_along": ("l2sp", anchor_goes_along),
    "moved_the_other_way": ("msam", moved_the_other_way),
    "noise_of_another_step": ("rwp", noise_of_another_step),
    "clean_descent": ("tram_x", clean_descent),
    "loss_gradient_at_epsilon": ("functional_sam", loss_gradient_at_epsilon),
    "not_preconditioned": ("functional_sam", not_preconditioned),
    "moments_without_a_past": ("functional_sam", moments_without_a_past),
}
# the ninth: an option of the product
NO_GRADIENT = {"perturbation": "released_code_without_gradient"}
EVERYWHERE = ("norm_not_reduced", "epsilon_not_published", "radius_per_rank", "mean_of_means")
# ZeRO keeps masters apart from the working copy, so a bad restore cannot reach them; stage 2
# overwrites its
ENGINES = {
    "fsdp2": tuple(MUTANTS),  # partitions at the boundary, so a missing clear does not show in fp32
    "zero2": EVERYWHERE,
    "zero3": (*EVERYWHERE, "second_gradient_added_to_first"),
}
ROW_ENGINES = ("fsdp2", "zero2")
ROW_OPTIONS = {
    "clean_descent": {"descent_noise": True, "sigma": 0.5},
    "not_preconditioned": {"precondition": True},
    "moments_without_a_past": {"precondition": True},
}

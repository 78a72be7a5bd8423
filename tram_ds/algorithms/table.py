"""An algorithm is a row of a table: an ascent, a radius, a penalty. Never a class, never a copied
loop.

ascent    how the weights climb before the second pass; none: one pass
radius    how far: a constant, or a trust region's distance (TRAM)
penalty   a trust region in the loss (TRPO, R3F, MESA)
noised    pass 1 takes its gradient on x + z (TRAM-Fisher)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from tram_ds.algorithms import trust_region as regions
from tram_ds.algorithms.ascent import (
    Ascent,
    Gauge,
    adaptive_scale,
    asam,
    asam_length,
    fisher,
    fisher_length,
    gradient_free,
    sam,
    sam_length,
)
from tram_ds.algorithms.distance import NOT_ADDITIVE, distance
from tram_ds.algorithms.trust_region import Mode, Reference, TrustRegion
from tram_ds.models.passes import Noise


@dataclass(frozen=True)
class Options:
    """Everything a row can be tuned by; None means the row's own default. Documented key by key in
    recipes/README.md."""

    rho: float | None = None
    eta: float = 0.1
    sigma: float = 0.1
    noise: Literal["normal", "uniform"] = "normal"
    noise_site: str | nn.Module | None = None  # None: the input embedding
    decay: float = 0.999
    weight: float = 0.1
    distance: str = "kl_forward"
    distance_on: Literal["logits", "probabilities"] = "logits"
    mmd_kernel: str = "imq2"
    mmd_scope: Literal["global", "local"] = "global"
    renyi_order: float = 0.5
    temperature: float = 1.0
    kl_norm: Literal["mean", "official"] = "mean"
    radius_scale: float = 1.0
    radius_min: float | None = None
    radius_max: float | None = None
    positions: Literal["all", "labelled"] = "all"
    reference_mode: Mode | None = None
    lookahead: bool = True
    reference_gradient: Literal["both", "current"] = "both"
    student_mode: Literal["train", "eval"] = "train"
    pass2_dropout: Literal["fresh", "replay"] = "fresh"
    penalty_passes: Literal["both", "ascent"] = "both"
    penalty_start: int = 0
    fisher: Literal["shared", "alg2"] = "shared"
    fisher_inverse: Literal["one_plus", "plus_eta"] = "one_plus"
    adaptive_filter: Literal["all", "matrices", "samsung"] = "all"
    samsung_eta: float = 0.01
    accumulation: Literal["global", "micro"] = "global"
    perturbation: Literal["gradient", "released_code_without_gradient"] = "gradient"
    perturb_every: int = 1
    perturbation_scope: Literal["job", "rank"] = "job"

    def z(self) -> Noise:
        # a module may be empty, or compiled, and say nothing of whether it is true
        site = "embedding" if self.noise_site is None else self.noise_site
        return Noise(site, self.sigma, self.noise)


@dataclass(frozen=True)
class Algorithm:
    """A row with its options bound; `step.train_step` reads nothing else.

    ascent: (theta, g, radius, norm) -> epsilon, or None for one pass. radius: rho, or the region
    whose distance it is.
    penalty, weight: lambda * region in the loss, from step `penalty_start` on, in both passes or in
    the ascent only.
    gauge: measures an epsilon in the units of the radius, for the self-check; None where nothing is
    promised.
    noised: pass 1 runs on x + z. fisher_pass: a second gradient, on x + z, estimates the Fisher
    diagonal (Algorithm 2).
    per_micro_batch: an epsilon for every micro-batch instead of one for the global batch
    (m-sharpness).
    every: climb only on steps that are a multiple of it; the others are the base optimizer's, with
    the penalty if any.
    per_rank: every rank climbs by its own gradient, its own norm and its own distance.
    """

    name: str
    ascent: Ascent | None = None
    gauge: Gauge | None = None
    radius: float | TrustRegion = 0.0
    penalty: TrustRegion | None = None
    weight: float = 0.0
    penalty_start: int = 0
    penalty_in_descent: bool = True
    noised: Noise | None = None
    fisher_pass: Noise | None = None
    student_mode: Literal["train", "eval"] = "train"
    pass2_masks: str = "pass_2"
    per_micro_batch: bool = False
    every: int = 1
    per_rank: bool = False

    @property
    def regions(self) -> list[TrustRegion]:
        return [r for r in (self.radius, self.penalty) if isinstance(r, TrustRegion)]

    def asks(self, region: TrustRegion) -> bool:
        """Whether this algorithm measures `region`."""
        return region is self.radius or region is self.penalty

    def at(self, step: int) -> Algorithm:
        """The algorithm of one step: itself, or without its ascent where `every` leaves that
        out."""
        return (
            self
            if step % self.every == 0
            else replace(self, ascent=None, gauge=None, radius=0.0, noised=None)
        )


MakeAscent = Callable[[Options], tuple[Ascent, Gauge | None]]
MakeReference = Callable[[Options], Reference]


@dataclass(frozen=True)
class Row:
    """One line of ALGORITHMS. radius: the default rho, or the reference whose distance is the
    radius."""

    ascent: MakeAscent | None = None
    radius: float | MakeReference = 0.0
    penalty: MakeReference | None = None
    noised: bool = False


def _sam(_: Options) -> tuple[Ascent, Gauge | None]:
    return sam(), sam_length


def _asam(o: Options) -> tuple[Ascent, Gauge | None]:
    t = adaptive_scale(o.adaptive_filter, o.samsung_eta)
    return (
        (asam(t), partial(asam_length, t=t))
        if o.perturbation == "gradient"
        else (gradient_free(t), None)
    )


def _fisher(o: Options) -> tuple[Ascent, Gauge | None]:
    gauge = partial(fisher_length, eta=o.eta, inverse=o.fisher_inverse)
    return fisher(o.eta, o.fisher_inverse), gauge if o.fisher == "shared" else None


def _previous(o: Options) -> Reference:
    return regions.Previous(o.reference_mode or "eval", o.lookahead)


def _initial(o: Options) -> Reference:
    return regions.initial(o.reference_mode or "eval")


def _average(o: Options) -> Reference:
    return regions.average(o.decay, o.reference_mode or "eval")


def _noised(o: Options) -> Reference:
    return regions.NoisedInput(o.z(), o.reference_mode or "train")


def _noised_differentiable(o: Options) -> Reference:
    return regions.NoisedInput(o.z(), o.reference_mode or "train", o.reference_gradient == "both")


# the paper's names; its SGD and Adam rows are `base` with that optimizer
ALGORITHMS: dict[str, Row] = {
    "base": Row(),
    "sam": Row(_sam, 0.05),
    "asam": Row(_asam, 0.5),
    "fsam": Row(_fisher, 0.1),
    "trpo": Row(penalty=_previous),
    "r3f": Row(penalty=_noised_differentiable),
    "mesa": Row(penalty=_average),
    "asam_trpo": Row(_asam, 0.5, _previous),
    "asam_r3f": Row(_asam, 0.5, _noised_differentiable),
    "asam_mesa": Row(_asam, 0.5, _average),
    "tram_prev": Row(_asam, _previous),
    "tram_init": Row(_asam, _initial),
    "tram_x": Row(_asam, _noised),
    "tram_fisher": Row(_fisher, 0.1, noised=True),
}


def algorithm(name: str, **options: Any) -> Algorithm:
    """The row `name` with `options` (fields of Options) bound. ValueError for an unknown name or
    option."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}: choose one of {', '.join(ALGORITHMS)}")
    unknown = set(options) - {f.name for f in fields(Options)}
    if unknown:
        raise ValueError(f"unknown option(s) {sorted(unknown)} of algorithm {name!r}")
    row, o = ALGORITHMS[name], Options(**options)
    ascent, gauge = row.ascent(o) if row.ascent else (None, None)
    return Algorithm(
        name,
        ascent,
        gauge,
        radius=_region(o, row.radius)
        if callable(row.radius)
        else (row.radius if o.rho is None else o.rho),
        penalty=_penalty(o, row.penalty) if row.penalty else None,
        weight=o.weight if row.penalty else 0.0,
        penalty_start=o.penalty_start,
        penalty_in_descent=o.penalty_passes == "both",
        noised=o.z() if row.noised and o.fisher == "shared" else None,
        fisher_pass=o.z() if row.noised and o.fisher == "alg2" else None,
        student_mode=o.student_mode,
        pass2_masks="pass_1" if o.pass2_dropout == "replay" else "pass_2",
        per_micro_batch=o.accumulation == "micro",
        every=o.perturb_every,
        per_rank=o.perturbation_scope == "rank",
    )


def _distance(o: Options) -> Callable[[Tensor, Tensor], Tensor]:
    return distance(
        o.distance,
        on=o.distance_on,
        temperature=o.temperature,
        kernel=o.mmd_kernel,
        order=o.renyi_order,
    )


def _region(o: Options, reference: MakeReference) -> TrustRegion:
    """The region of a radius."""
    return TrustRegion(
        reference(o),
        _distance(o),
        o.radius_scale,
        o.radius_min,
        o.radius_max,
        official=o.kl_norm == "official",
        labelled=o.positions == "labelled",
        gathered=o.distance in NOT_ADDITIVE
        and o.mmd_scope == "global"
        and o.perturbation_scope == "job",
    )


def _penalty(o: Options, reference: MakeReference) -> TrustRegion:
    """The region of a penalty: always additive over micro-batches, because its gradient is taken
    one by one."""
    return TrustRegion(
        reference(o),
        _distance(o),
        official=o.kl_norm == "official",
        labelled=o.positions == "labelled",
    )

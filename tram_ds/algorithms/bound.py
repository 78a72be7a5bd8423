"""A row of the table with its options bound: of every part what it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from tram_ds.algorithms import reference as prior
from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.ascent import (
    Ascent,
    EpsilonLength,
    adaptive_scale,
    asam,
    asam_length,
    fisher,
    fisher_length,
    gradient_free,
    preconditioned,
    sam,
    sam_length,
)
from tram_ds.algorithms.distance import NOT_ADDITIVE, distance
from tram_ds.algorithms.options import (
    RHO,
    Adaptive,
    Average,
    BothBranches,
    Climb,
    Constant,
    Fisher,
    FisherOnNoise,
    Gradient,
    Initial,
    Momentum,
    Noised,
    NoisedDescent,
    Part,
    Penalty,
    Previous,
    Pull,
    Radius,
    Region,
    StoredGradient,
    WeightNoise,
    radius_max,
)
from tram_ds.algorithms.radius import Calibrated, Relative, Rule, Scaled
from tram_ds.algorithms.reference import Reference
from tram_ds.algorithms.shift import AlongMomentum, RandomWeights, Shift
from tram_ds.algorithms.table import ALGORITHMS, AlgorithmSection, asked, checked
from tram_ds.algorithms.trust_region import TrustRegion
from tram_ds.models.passes import Noise

MakeAscent = Callable[[Algorithm], tuple[Ascent, EpsilonLength | None]]
MakeReference = Callable[[Algorithm, Noise], Reference]  # what it adds where the row has noise


def _sam(row: Algorithm) -> tuple[Ascent, EpsilonLength | None]:
    return preconditioned() if row.of(Gradient).precondition else sam(), sam_length


def _asam(row: Algorithm) -> tuple[Ascent, EpsilonLength | None]:
    o = row.of(Adaptive)
    t = adaptive_scale(o.adaptive_filter, o.samsung_eta)
    if row.of(Radius).perturbation == "gradient":
        return asam(t), partial(asam_length, t=t)
    return gradient_free(t), None


def _fisher(row: Algorithm) -> tuple[Ascent, EpsilonLength | None]:
    o = row.of(Fisher)
    epsilon_length = partial(fisher_length, eta=o.eta, inverse=o.fisher_inverse)
    shared = row.of(FisherOnNoise).fisher == "shared"
    return fisher(o.eta, o.fisher_inverse), epsilon_length if shared else None


def _momentum(row: Algorithm) -> tuple[Shift, float]:
    own = row.of(Constant).rho
    # as in its authors' code
    rho = 0.3 if own is None else own
    return AlongMomentum(rho), rho


def _weight_noise(row: Algorithm) -> tuple[Shift, float]:
    sigma = row.of(WeightNoise).weight_sigma
    return RandomWeights(sigma), sigma


def _previous(row: Algorithm, _: Noise) -> Reference:
    return prior.Previous(row.of(Region).reference_mode or "eval", row.of(Previous).lookahead)


def _initial(row: Algorithm, _: Noise) -> Reference:
    return prior.initial(row.of(Region).reference_mode or "eval")


def _average(row: Algorithm, _: Noise) -> Reference:
    return prior.average(row.of(Average).decay, row.of(Region).reference_mode or "eval")


def _noised(row: Algorithm, noise: Noise) -> Reference:
    both = BothBranches in row.parts and row.of(BothBranches).reference_gradient == "both"
    return prior.NoiseReference(noise, row.of(Region).reference_mode or "train", both)


# the part that names it -> how it is made and, of an ascent, the paper's rho
ASCENTS: dict[type[Part], tuple[MakeAscent, float]] = {
    Gradient: (_sam, 0.05),
    Adaptive: (_asam, RHO),
    Fisher: (_fisher, 0.1),
}
# the part that names it -> the shift and its size
SHIFTS: dict[type[Part], Callable[[Algorithm], tuple[Shift, float]]] = {
    Momentum: _momentum,
    WeightNoise: _weight_noise,
}
REFERENCES: dict[type[Part], MakeReference] = {
    Previous: _previous,
    Initial: _initial,
    Average: _average,
    Noised: _noised,
}


def algorithm(name: str | Mapping[str, Any], **options: Any) -> Algorithm:
    """The row `name` with `options` bound: the keys of a recipe's `algorithm` section, of which
    noise_site may also be a module. ValueError for what a recipe refuses."""
    given = asked(name, options)
    site = given.get("noise_site")
    if not isinstance(site, nn.Module):
        return bind(checked(given))
    # a stand-in of the right type: a recipe has no module
    section = checked({**given, "noise_site": "embedding"})  # does the row read it?
    return bind(section.model_copy(update={"noise_site": site}))


def bind(section: AlgorithmSection, site: str = "embedding") -> Algorithm:
    """The row of a checked section. site: where noise goes if the section leaves that open."""
    parts = {
        # unchecked: the section was, and a module as noise_site is no recipe's
        kind: kind.model_construct(**{key: getattr(section, key) for key in kind.model_fields})
        for kind in ALGORITHMS[section.name]
    }
    row = Algorithm(section.name, parts, stored_gradient=StoredGradient in parts)
    o = row.of(Noised)
    # a module may be empty, or compiled, and say nothing of whether it is true
    at = site if o.noise_site is None else o.noise_site
    noise = Noise(at, o.sigma, o.noise, relative=o.sigma_unit == "rms")
    row = _climbing(row)
    if FisherOnNoise in parts:
        key = "noised" if row.of(FisherOnNoise).fisher == "shared" else "fisher_pass"
        row = replace(row, **{key: noise})
    if Radius in parts:
        row = replace(row, radius=_radius_region(row, noise))
    if Penalty in parts:
        row = replace(row, penalty=_region(row, noise))
    if row.of(NoisedDescent).descent_noise:
        row = replace(row, descent=noise)
    if Pull in parts:
        row = replace(row, anchor=prior.initial())
    for kind in parts.keys() & SHIFTS.keys():
        shift, radius = SHIFTS[kind](row)
        row = replace(row, shift=shift, radius=radius)
    return row


def _climbing(row: Algorithm) -> Algorithm:
    """With its ascent, and rho if the radius is constant."""
    if Climb not in row.parts:
        return row
    # a row that climbs has one of these parts and no more
    make, rho = next(ASCENTS[kind] for kind in row.parts if kind in ASCENTS)
    ascent, epsilon_length = make(row)
    own = row.of(Constant).rho
    return replace(
        row, ascent=ascent, epsilon_length=epsilon_length, radius=rho if own is None else own
    )


def _region(row: Algorithm, noise: Noise) -> TrustRegion:
    """The region of a penalty: always additive over micro-batches, because its gradient is taken
    one by one."""
    o = row.of(Region)
    reference = next(REFERENCES[kind] for kind in row.parts if kind in REFERENCES)
    measure: Callable[[Tensor, Tensor], Tensor] = distance(
        o.distance,
        on=o.distance_on,
        temperature=o.temperature,
        kernel=o.mmd_kernel,
        order=o.renyi_order,
    )
    return TrustRegion(
        reference(row, noise),
        measure,
        official=o.kl_norm == "official",
        labelled=o.positions == "labelled",
    )


def _radius_region(row: Algorithm, noise: Noise) -> TrustRegion:
    """The region of a radius: scaled and bounded, and over the whole job where the distance asks
    for that."""
    o, job = row.of(Radius), row.of(Climb).perturbation_scope == "job"
    # an epsilon per rank has a d of its own rows, for which nothing is gathered
    whole = row.of(Region).distance in NOT_ADDITIVE and o.mmd_scope == "global" and job
    return replace(
        _region(row, noise),
        rule=_rule(row),
        minimum=o.radius_min,
        maximum=radius_max(o),
        gathered=whole,
    )


def _rule(row: Algorithm) -> Rule:
    o, own = row.of(Radius), row.of(Constant).rho
    rho = RHO if own is None else own
    if o.radius == "relative":
        return Relative(rho)
    if o.radius_scale == "auto":
        return Calibrated(rho, o.calibration_steps)
    return Scaled(o.radius_scale)

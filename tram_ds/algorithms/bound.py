"""A row of the table with its options bound: what a step needs of an algorithm.

ascent    how the weights climb before the second pass; none: one pass
radius    how far: a constant, or a trust region's distance (TRAM)
penalty   a trust region in the loss (TRPO, R3F, MESA)
shift     where the only pass is taken, by no gradient of this step (MSAM, random weights)
anchor    weights that the descent is pulled to (L2-SP)
noised    pass 1 takes its gradient on x + z (TRAM-Fisher)
descent   pass 2 does (TRAM-x as released)
stored_gradient  pass 2 descends through the dL/dlogits of pass 1 (Functional-SAM)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from tram_ds.algorithms import trust_region as regions
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
from tram_ds.algorithms.shift import AlongMomentum, RandomWeights, Shift
from tram_ds.algorithms.table import ALGORITHMS, AlgorithmSection, asked, checked
from tram_ds.algorithms.trust_region import Reference, TrustRegion, WeightReference
from tram_ds.engines import pull as move
from tram_ds.models.passes import Noise

P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class Algorithm:
    """A row with its options bound; `step.train_step` reads nothing else.

    parts: the row's, by kind, with its options; `of` asks for one.
    ascent: (theta, g, radius, norm) -> epsilon, or None for one pass. radius: rho, or the region
    whose distance it is.
    penalty: the region whose distance is in the loss. anchor: the weights that the descent is
    pulled to, measured by no region.
    epsilon_length: of an epsilon in the units of the radius, for the self-check; None where nothing
    is promised.
    shift: what moves the weights before the only pass.
    noised: pass 1 runs on x + z. fisher_pass: a second gradient, on x + z, estimates the Fisher
    diagonal (Algorithm 2). descent: pass 2 runs on x + z, below which nothing is learned.
    stored_gradient: pass 2 takes the model's Jacobian at theta + epsilon, and the loss's gradient
    with respect to its logits from pass 1.
    """

    name: str
    parts: Mapping[type[Part], Part] = field(default_factory=dict)
    ascent: Ascent | None = None
    epsilon_length: EpsilonLength | None = None
    radius: float | TrustRegion = 0.0
    penalty: TrustRegion | None = None
    anchor: WeightReference | None = None
    shift: Shift | None = None
    noised: Noise | None = None
    fisher_pass: Noise | None = None
    descent: Noise | None = None
    stored_gradient: bool = False

    def of(self, kind: type[P]) -> P:
        """A part's options; of a part that the row does not have, the defaults, which change
        nothing."""
        found = self.parts[kind] if kind in self.parts else kind()
        assert isinstance(found, kind)
        return found

    @property
    def regions(self) -> list[TrustRegion]:
        return [r for r in (self.radius, self.penalty) if isinstance(r, TrustRegion)]

    @property
    def references(self) -> list[Reference]:
        """All that is remembered from step to step."""
        return [*(r.reference for r in self.regions), *([self.anchor] if self.anchor else [])]

    @property
    def through_reference(self) -> bool:
        """Whether a gradient flows through a reference's forward pass, too."""
        noisy = [
            r.reference for r in self.regions if isinstance(r.reference, regions.NoiseReference)
        ]
        return any(reference.differentiable for reference in noisy)

    @property
    def perturbs(self) -> bool:
        """Whether a pass of a step is at theta + epsilon."""
        return self.ascent is not None or self.shift is not None

    def asks(self, reference: Reference) -> bool:
        """Whether this algorithm measures the distance to what `reference` predicts."""
        return any(region.reference is reference for region in self.regions)

    def pull(self) -> move.Pull | None:
        """What the descent is pulled to, once the anchor is prepared."""
        if self.anchor is None:
            return None
        assert self.anchor.weights is not None
        return move.Pull(self.anchor.weights, self.of(Pull).pull)

    def at(self, step: int) -> Algorithm:
        """The algorithm of one step: itself, or without its ascent where `perturb_every` leaves
        that out."""
        climbs = step % self.of(Climb).perturb_every == 0
        if climbs:
            return self
        return replace(
            self,
            ascent=None,
            epsilon_length=None,
            radius=0.0,
            noised=None,
            descent=None,
            stored_gradient=False,
        )


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
    rho = 0.3 if own is None else own
    return AlongMomentum(rho), rho


def _weight_noise(row: Algorithm) -> tuple[Shift, float]:
    sigma = row.of(WeightNoise).weight_sigma
    return RandomWeights(sigma), sigma


def _previous(row: Algorithm, _: Noise) -> Reference:
    return regions.Previous(row.of(Region).reference_mode or "eval", row.of(Previous).lookahead)


def _initial(row: Algorithm, _: Noise) -> Reference:
    return regions.initial(row.of(Region).reference_mode or "eval")


def _average(row: Algorithm, _: Noise) -> Reference:
    return regions.average(row.of(Average).decay, row.of(Region).reference_mode or "eval")


def _noised(row: Algorithm, noise: Noise) -> Reference:
    both = BothBranches in row.parts and row.of(BothBranches).reference_gradient == "both"
    return regions.NoiseReference(noise, row.of(Region).reference_mode or "train", both)


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
    section = checked({**given, "noise_site": "embedding"})  # does the row read it?
    return bind(section.model_copy(update={"noise_site": site}))


def bind(section: AlgorithmSection, site: str = "embedding") -> Algorithm:
    """The row of a checked section. site: where noise goes if the section leaves that open."""
    parts = {
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
        row = replace(row, anchor=regions.initial())
    for kind in parts.keys() & SHIFTS.keys():
        shift, radius = SHIFTS[kind](row)
        row = replace(row, shift=shift, radius=radius)
    return row


def _climbing(row: Algorithm) -> Algorithm:
    """With its ascent, and rho if the radius is constant."""
    if Climb not in row.parts:
        return row
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

"""What can be tuned, each option once: a field of the part of an algorithm that reads it.

Type, bounds, default and meaning stand here alone. From these fields come the recipe's `algorithm`
section, the refusal of what a row does not read, recipes/README.md, the JSON schema and the keyword
arguments of `wrap`. The code that uses an option asks the bound row for its part:
`row.of(Climb).perturb_every`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from tram_ds.runtime.checked import STRICT, Above, AtLeast, NotNegative, Positive


@dataclass(frozen=True)
class When:
    """Read only where another option of the row has one of these values: one of several, or the
    row has none of them."""

    any_of: Mapping[str, tuple[str, ...]]


class Part(BaseModel):
    """A piece of an algorithm and the options it reads. A row of ALGORITHMS is a tuple of these."""

    model_config = STRICT


class SecondMasks(Part):
    """Dropout in the second pass, where the row leaves that open."""

    pass2_dropout: Literal["fresh", "replay"] = "fresh"
    """Dropout masks of the second pass: new ones, or those of the first."""


class Climb(Part):
    """Two passes: the second at theta + epsilon."""

    accumulation: Literal["global", "micro"] = "global"
    """One epsilon for the global batch, or one for every micro-batch across the ranks (m-sharpness;
    one more sharded fp32 copy of the gradient)."""
    perturb_every: Positive = 1
    """Climb on every k-th step only; the steps between are the base optimizer's. Cheaper, and
    another algorithm."""
    perturbation_scope: Literal["job", "rank"] = "job"
    """One epsilon for the job, or one for every rank by its own gradient and distance (m-sharpness;
    saves the first reduction; engine: replicated only). Another algorithm."""


class Gradient(Part):
    """Along g: SAM."""

    precondition: bool = False
    """Climb along g / (sqrt(v) + eps) instead of g, v Adam's second moments with this g in them; as
    far, rho. Needs Adam or AdamW."""


class StoredGradient(Part):
    """Pass 2 descends through the dL/dlogits of pass 1, under its dropout masks: Functional-SAM."""


class Adaptive(Part):
    """Along T^2 g: ASAM and TRAM."""

    adaptive_filter: Literal["all", "matrices", "norms", "samsung"] = "all"
    """T of the adaptive rows: abs(theta) everywhere; 0 outside matrices; 0 outside normalisation
    layers, so that only these climb; or abs(theta) + samsung_eta for weights, 1 for biases."""
    samsung_eta: Annotated[AtLeast, When({"adaptive_filter": ("samsung",)})] = 0.01
    """Added to abs(theta) by adaptive_filter samsung."""


class Fisher(Part):
    """Along F^-1 g: FSAM and TRAM-Fisher."""

    eta: AtLeast = 0.1
    """Damping of the Fisher diagonal f: F^-1 = 1 / (1 + eta f) or 1 / (f + eta), see
    fisher_inverse."""
    fisher_inverse: Literal["one_plus", "plus_eta"] = "one_plus"
    """F^-1 = 1 / (1 + eta f), or 1 / (f + eta)."""


class FisherOnNoise(Part):
    """F from a gradient at x + z: TRAM-Fisher."""

    fisher: Literal["shared", "alg2"] = "shared"
    """tram_fisher: one noised pass gives gradient and Fisher diagonal (2 passes), or Algorithm 2 to
    the letter (3 passes)."""


class Constant(Part):
    """A radius that does not change; or, of a trust region, what it is on average."""

    rho: Annotated[Above | None, When({"radius": ("relative",), "radius_scale": ("auto",)})] = None
    """Constant radius of the perturbation, or the mean that radius: relative and radius_scale: auto
    give the TRAM rows'; null = the paper's: 0.05 (sam), 0.5 (asam, its combinations, the TRAM
    rows), 0.1 (fsam, tram_fisher), 0.3 (msam: its authors' code); functional_sam has sam's."""


class Momentum(Part):
    """One pass, at weights moved along the optimizer's first moment: MSAM."""


class WeightNoise(Part):
    """One pass, at weights with Gaussian noise on them: random weight perturbation."""

    weight_sigma: Above = 0.05
    """Standard deviation of the noise on a weight, times the root mean square of its row; biases
    and norms get none."""


class Region(Part):
    """A trust region: the distance to what a reference predicts."""

    distance: Literal["kl_forward", "kl_reverse", "kl_symmetric", "mmd", "l2", "renyi"] = (
        "kl_forward"
    )
    """d(reference, current model); kl_forward = KL(reference || current). mmd is for classification
    only."""
    distance_on: Annotated[
        Literal["logits", "probabilities"], When({"distance": ("l2", "mmd")})
    ] = "logits"
    """What mmd and l2 compare."""
    mmd_kernel: Annotated[Literal["imq2", "imq", "imq3", "rbf"], When({"distance": ("mmd",)})] = (
        "imq2"
    )
    """Kernel of mmd: inverse multiquadratic with exponent 1/2 (imq2), 1 (imq) or 3/2 (imq3), or
    Gaussian (rbf)."""
    renyi_order: Annotated[Above, When({"distance": ("renyi",)})] = 0.5
    """Order alpha of the Renyi divergence; not 1, which is kl_forward."""
    kl_norm: Annotated[
        Literal["mean", "official"],
        When({"distance": ("kl_forward", "kl_reverse", "kl_symmetric")}),
    ] = "mean"
    """mean over positions of the global batch, or the released code's further division by classes
    and rows."""
    temperature: Above = 1.0
    """T divides both sides' logits, and the distance is multiplied by T^2."""
    positions: Literal["all", "labelled"] = "all"
    """Positions d averages over: all that are not padding, or only those with a counted target."""
    reference_mode: Literal["eval", "paired"] | None = None
    """Dropout of the reference: off (eval) or the current model's masks (paired); null = eval, at x
    + z its own masks."""


class Radius(Part):
    """The trust region's distance is the radius: TRAM."""

    mmd_scope: Annotated[Literal["global", "local"], When({"distance": ("mmd",)})] = "global"
    """mmd of a radius: over the global batch, or the mean over micro-batches (a penalty's is always
    the latter)."""
    radius: Literal["distance", "relative"] = "distance"
    """Radius of the TRAM rows: radius_scale times d (Eq. 7), or rho times d over its running mean
    (decay 0.99 a step): a trust region in its shape, ASAM in its size, on any model."""
    radius_scale: Annotated[Above | Literal["auto"], When({"radius": ("distance",)})] = 1.0
    """Radius of the TRAM rows per unit of d. auto: rho over the mean of the first calibration_steps
    distances above 0, and then constant."""
    calibration_steps: Annotated[Positive, When({"radius_scale": ("auto",)})] = 50
    """Distances that radius_scale: auto is the mean of; in these steps, of those so far."""
    radius_min: AtLeast | None = None
    """Smallest radius of the TRAM rows, after scaling; null = none."""
    radius_max: Above | None = None
    """Largest radius of the TRAM rows, after scaling; null = 0.5, the paper's bound d <= rho, or
    none where rho gives the size (radius: relative, radius_scale: auto)."""
    student_mode: Literal["train", "eval"] = "train"
    """Mode of the current model for the TRAM rows' d: pass 1 itself (train), or one more forward
    without dropout (eval)."""
    perturbation: Literal["gradient", "released_code_without_gradient"] = "gradient"
    """Eq. 7, or what the paper's released code computes instead: no gradient in epsilon, not an
    ascent direction."""


class Penalty(Part):
    """The trust region's distance is in the loss: TRPO, R3F, MESA."""

    weight: AtLeast = 0.1
    """lambda: weight of the distance in the loss of the penalty rows."""
    penalty_start: NotNegative = 0
    """Step from which the penalty is active."""


class Pull(Part):
    """The base optimizer's step, and one towards theta_0: L2-SP."""

    pull: AtLeast = 0.1
    """lambda of the decoupled L2-SP: theta moves by lr lambda (theta_0 - theta) beside the base
    optimizer's step, as adamw's weight decay does towards 0; times optimizer.lr at most 1."""


class BesideAscent(Part):
    """A penalty in a row that climbs as well."""

    penalty_passes: Literal["both", "ascent"] = "both"
    """Passes whose loss has the penalty, for the asam_ combinations."""


class Previous(Part):
    """The reference is theta_{t-1}."""

    lookahead: bool = True
    """theta_{t-1}: predict the next batch while theta_t is there, instead of keeping its weights;
    the same numbers."""


class Initial(Part):
    """The reference is theta_0."""


class Average(Part):
    """The reference is a moving average of the weights."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of MESA's moving average of the weights, per step."""


class Noised(Part):
    """x + z: what the reference sees, or TRAM-Fisher's pass 1."""

    sigma: Above = 0.1
    """Size of the input noise: standard deviation (normal) or half width (uniform), in units of the
    embedding or pixel value."""
    noise: Literal["normal", "uniform"] = "normal"
    """Distribution of the input noise."""
    sigma_unit: Literal["absolute", "rms"] = "absolute"
    """sigma as it is, or times the root mean square of the x that z is added to (of each
    embedding; of each picture)."""
    noise_site: Literal["embedding", "pixel_values"] | None = None
    """Where the noise is added: the output of the input embedding (of words or patches) or the
    pixel values; null = the task's: embedding for text, pixel_values for images."""


class NoisedDescent(Part):
    """The gradient of pass 2 may be of x + z as well: TRAM-x as released."""

    descent_noise: bool = False
    """tram_x: pass 2 on x + z, whose gradient stops at z, so that only a tied head or weight decay
    moves the word embedding. What the paper's released code does; Eq. 6 has x."""


class BothBranches(Part):
    """A reference through which the gradient flows as well: R3F."""

    reference_gradient: Literal["both", "current"] = "both"
    """R3F: the gradient flows through both branches, or only through the one without noise."""


RHO = 0.5  # of ASAM, and the paper's bound of a TRAM radius (section 3: d <= rho)


def sized_by_rho(o: Any) -> bool:
    """Whether rho gives the size of a trust region's radius. o has the options of Radius."""
    return o.radius == "relative" or o.radius_scale == "auto"


def radius_max(o: Any) -> float | None:
    """The largest radius; None: there is none. o has the options of Radius."""
    return RHO if o.radius_max is None and not sized_by_rho(o) else o.radius_max


def disagreements(o: Any) -> Iterator[tuple[str, str]]:
    """(option, what is wrong and the way out) of values that do not go together; o has every
    option."""
    if o.renyi_order == 1:
        yield "renyi_order", "order 1 is the KL divergence: set algorithm.distance=kl_forward"
    largest = radius_max(o)
    if None not in (o.radius_min, largest) and o.radius_min > largest:
        way = "swap or remove one" if o.radius_max is not None else "set algorithm.radius_max"
        yield "radius_min", f"is above algorithm.radius_max = {largest}; {way}"
    if o.student_mode == "eval" and o.reference_mode == "paired":
        yield (
            "reference_mode",
            "paired repeats the current model's dropout masks, but algorithm.student_mode = eval "
            "has none",
        )

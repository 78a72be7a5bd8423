"""The `algorithm` section of a recipe, and which of its options each row of ALGORITHMS reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tram_ds.recipe.sections import NamedSection, NotNegative, Positive, chosen, refusal

Above = Annotated[float, Field(gt=0)]
AtLeast = Annotated[float, Field(ge=0)]

# A region's reference is the model at other weights, or at x + z.
_WEIGHT_REGION = {"trpo", "mesa", "asam_trpo", "asam_mesa", "tram_prev", "tram_init"}
_NOISE_REGION = {"r3f", "asam_r3f", "tram_x"}
_REGION = _WEIGHT_REGION | _NOISE_REGION
_PENALTY = {"trpo", "r3f", "mesa", "asam_trpo", "asam_r3f", "asam_mesa"}
_DISTANCE_RADIUS = {"tram_prev", "tram_init", "tram_x"}
_FISHER = {"fsam", "tram_fisher"}
_ADAPTIVE = {"asam", "asam_trpo", "asam_r3f", "asam_mesa"} | _DISTANCE_RADIUS
_CONSTANT_RADIUS = {"sam", "asam", "asam_trpo", "asam_r3f", "asam_mesa"} | _FISHER
# rows this table speaks of; a newer row may set every option
KNOWN = {"base"} | _REGION | _CONSTANT_RADIUS

READ_BY: dict[str, set[str]] = {
    "rho": _CONSTANT_RADIUS,
    "eta": _FISHER,
    "sigma": _NOISE_REGION | {"tram_fisher"},
    "noise": _NOISE_REGION | {"tram_fisher"},
    "noise_site": _NOISE_REGION | {"tram_fisher"},
    "decay": {"mesa", "asam_mesa"},
    "weight": _PENALTY,
    "distance": _REGION,
    "distance_on": _REGION,
    "mmd_kernel": _REGION,
    "mmd_scope": _DISTANCE_RADIUS,
    "renyi_order": _REGION,
    "kl_norm": _REGION,
    "temperature": _REGION,
    "positions": _REGION,
    "reference_mode": _REGION,
    "radius_scale": _DISTANCE_RADIUS,
    "radius_min": _DISTANCE_RADIUS,
    "radius_max": _DISTANCE_RADIUS,
    "student_mode": _DISTANCE_RADIUS,
    "pass2_dropout": _CONSTANT_RADIUS | _DISTANCE_RADIUS,
    "penalty_passes": _PENALTY & _CONSTANT_RADIUS,
    "penalty_start": _PENALTY,
    "reference_gradient": {"r3f", "asam_r3f"},
    "fisher": {"tram_fisher"},
    "fisher_inverse": _FISHER,
    "adaptive_filter": _ADAPTIVE,
    "samsung_eta": _ADAPTIVE,
    "accumulation": _CONSTANT_RADIUS | _DISTANCE_RADIUS,
    "perturbation": _DISTANCE_RADIUS,
    "lookahead": {"trpo", "asam_trpo", "tram_prev"},
    "perturb_every": _CONSTANT_RADIUS | _DISTANCE_RADIUS,
    "perturbation_scope": _CONSTANT_RADIUS | _DISTANCE_RADIUS,
}
_DISTANCE_READS = {  # option -> the distances that read it
    "distance_on": {"mmd", "l2"},
    "mmd_kernel": {"mmd"},
    "mmd_scope": {"mmd"},
    "renyi_order": {"renyi"},
    "kl_norm": {"kl_forward", "kl_reverse", "kl_symmetric"},
}


class AlgorithmSection(NamedSection):
    """The training algorithm: a row of ALGORITHMS and its options. An option its row does not read
    is refused."""

    name: str
    """A row of ALGORITHMS; base is the optimizer alone (the paper's SGD and Adam rows)."""
    rho: Above | None = None
    """Constant radius of the perturbation; null = the paper's: 0.05 (sam), 0.5 (asam and its
    combinations), 0.1 (fsam, tram_fisher)."""
    eta: AtLeast = 0.1
    """Damping of the Fisher diagonal f: F^-1 = 1 / (1 + eta f) or 1 / (f + eta), see
    fisher_inverse."""
    sigma: Above = 0.1
    """Size of the input noise: standard deviation (normal) or half width (uniform), in units of the
    embedding or pixel value."""
    noise: Literal["normal", "uniform"] = "normal"
    """Distribution of the input noise."""
    noise_site: Literal["embedding", "pixel_values"] | None = None
    """Where the noise is added: the output of the input embedding (of words or patches) or the
    pixel values; null = the task's: embedding for text, pixel_values for images."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of MESA's moving average of the weights, per step."""
    weight: AtLeast = 0.1
    """lambda: weight of the distance in the loss of the penalty rows."""
    distance: Literal["kl_forward", "kl_reverse", "kl_symmetric", "mmd", "l2", "renyi"] = (
        "kl_forward"
    )
    """d(reference, current model); kl_forward = KL(reference || current). mmd is for classification
    only."""
    distance_on: Literal["logits", "probabilities"] = "logits"
    """What mmd and l2 compare."""
    mmd_kernel: Literal["imq2", "imq", "imq3", "rbf"] = "imq2"
    """Kernel of mmd: inverse multiquadratic with exponent 1/2 (imq2), 1 (imq) or 3/2 (imq3), or
    Gaussian (rbf)."""
    mmd_scope: Literal["global", "local"] = "global"
    """mmd of a radius: over the global batch, or the mean over micro-batches (a penalty's is always
    the latter)."""
    renyi_order: Above = 0.5
    """Order alpha of the Renyi divergence; not 1, which is kl_forward."""
    kl_norm: Literal["mean", "official"] = "mean"
    """mean over positions of the global batch, or the released code's further division by classes
    and rows."""
    temperature: Above = 1.0
    """T divides both sides' logits, and the distance is multiplied by T^2."""
    positions: Literal["all", "labelled"] = "all"
    """Positions d averages over: all that are not padding, or only those with a counted target."""
    lookahead: bool = True
    """theta_{t-1}: predict the next batch while theta_t is there, instead of keeping its weights;
    the same numbers."""
    reference_mode: Literal["eval", "paired"] | None = None
    """Dropout of the reference: off (eval) or the current model's masks (paired); null = eval, at x
    + z its own masks."""
    radius_scale: Above = 1.0
    """Radius of the TRAM rows per unit of d."""
    radius_min: AtLeast | None = None
    """Smallest radius of the TRAM rows, after scaling; null = none."""
    radius_max: Above | None = None
    """Largest radius of the TRAM rows, after scaling; null = none."""
    student_mode: Literal["train", "eval"] = "train"
    """Mode of the current model for the TRAM rows' d: pass 1 itself (train), or one more forward
    without dropout (eval)."""
    pass2_dropout: Literal["fresh", "replay"] = "fresh"
    """Dropout masks of the second pass: new ones, or those of the first."""
    penalty_passes: Literal["both", "ascent"] = "both"
    """Passes whose loss has the penalty, for the asam_ combinations."""
    penalty_start: NotNegative = 0
    """Step from which the penalty is active."""
    reference_gradient: Literal["both", "current"] = "both"
    """R3F: the gradient flows through both branches, or only through the one without noise."""
    fisher: Literal["shared", "alg2"] = "shared"
    """tram_fisher: one noised pass gives gradient and Fisher diagonal (2 passes), or Algorithm 2 to
    the letter (3 passes)."""
    fisher_inverse: Literal["one_plus", "plus_eta"] = "one_plus"
    """F^-1 = 1 / (1 + eta f), or 1 / (f + eta)."""
    adaptive_filter: Literal["all", "matrices", "samsung"] = "all"
    """T of the adaptive rows: abs(theta) everywhere; 0 outside matrices; or abs(theta) +
    samsung_eta for weights, 1 for biases."""
    samsung_eta: AtLeast = 0.01
    """Added to abs(theta) by adaptive_filter samsung."""
    accumulation: Literal["global", "micro"] = "global"
    """One epsilon for the global batch, or one for every micro-batch across the ranks (m-sharpness;
    one more sharded fp32 copy of the gradient)."""
    perturbation: Literal["gradient", "released_code_without_gradient"] = "gradient"
    """Eq. 7, or what the paper's released code computes instead: no gradient in epsilon, not an
    ascent direction."""
    perturb_every: Positive = 1
    """Climb on every k-th step only; the steps between are the base optimizer's. Cheaper, and
    another algorithm."""
    perturbation_scope: Literal["job", "rank"] = "job"
    """One epsilon for the job, or one for every rank by its own gradient and distance (m-sharpness;
    saves the first reduction; engine: replicated only). Another algorithm."""

    def options(self) -> dict[str, Any]:
        """The options this row reads: keyword arguments of
        `tram_ds.algorithms.table.algorithm(name, ...)`."""
        unread = self.unread()
        return {
            key: getattr(self, key)
            for key in type(self).model_fields
            if key != "name" and key not in unread
        }

    def unread(self) -> dict[str, str]:
        if self.name not in KNOWN:
            return {}
        found, row = {}, f"algorithm.name = {self.name}"
        for key, readers in READ_BY.items():
            if self.name not in readers:
                found[key] = (
                    f"{row} does not read algorithm.{key} (read by {', '.join(sorted(readers))})"
                )
                if key == "rho" and self.name in _DISTANCE_RADIUS:
                    found[key] += (
                        "; its radius is the distance: use algorithm.radius_scale, radius_min or "
                        "radius_max"
                    )
            elif self.distance not in _DISTANCE_READS.get(key, {self.distance}):
                distances = ", ".join(sorted(_DISTANCE_READS[key]))
                found[key] = (
                    f"algorithm.distance = {self.distance} does not read algorithm.{key} (read by "
                    f"{distances})"
                )
        if self.adaptive_filter != "samsung":
            found.setdefault(
                "samsung_eta",
                f"algorithm.adaptive_filter = {self.adaptive_filter} does not read it",
            )
        return found

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        from tram_ds.algorithms.table import ALGORITHMS  # lazily: it imports torch

        return chosen(value, ALGORITHMS)

    @model_validator(mode="after")
    def _fits(self) -> AlgorithmSection:
        if self.renyi_order == 1:
            raise refusal(
                ("renyi_order", "order 1 is the KL divergence: set algorithm.distance=kl_forward")
            )
        if (
            self.radius_min is not None
            and self.radius_max is not None
            and self.radius_min > self.radius_max
        ):
            raise refusal(
                (
                    "radius_min",
                    f"is above algorithm.radius_max = {self.radius_max}; swap or remove one",
                )
            )
        if self.student_mode == "eval" and self.reference_mode == "paired":
            text = (
                "paired repeats the current model's dropout masks, but algorithm.student_mode "
                "= eval has none"
            )
            raise refusal(("reference_mode", text))
        return self

"""Ascent directions: (theta, g, radius, norm) -> epsilon, element-wise rules over the shards a rank
owns.

`norm` is the engine's global norm: the only communication. `radius` is a Python number or a ()
tensor, the same on every rank. Every epsilon has <epsilon, g> >= 0, and radius 0 gives epsilon 0
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tram_ds.algorithms.precondition import denominator
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Lazy, Shards, Span

TINY = 1e-12  # keeps 0 / 0 out of a step whose gradient vanishes; every public SAM uses this value

Norm = Callable[[Shards | Lazy], Tensor]
Scale = Callable[[Shards], Shards]  # T as a function of theta


# (theta, g, f), a part of each, -> as many elements
Rule = Callable[[Shards, Shards, Shards], Shards]


@dataclass(frozen=True)
class Ascent:
    """epsilon = radius * direction / ||weighted||_2. Both rules are of theta, g, and the gradient f
    the Fisher is made of.

    linear: weighted(theta, c g, c f) = c weighted(theta, g, f), so its norm may be measured on a
    gradient not yet divided by the count of targets, which is known only after the reduction that
    can bring the norm along. by_moments: f is Adam's denominator instead, see `moments`.
    """

    weighted: Rule
    direction: Rule
    linear: bool = True
    by_moments: bool = False

    def moments(self, engine: Engine) -> Lazy | None:
        """f where it is what the base optimizer divides by; None where it is a gradient. After the
        pass whose gradient g is."""
        return denominator(engine) if self.by_moments else None

    def __call__(
        self,
        theta: Shards,
        g: Shards | Lazy,
        radius: Tensor | float,
        norm: Norm,
        f: Shards | Lazy | None = None,
    ) -> Lazy:
        """epsilon by both steps below. Collective, as `norm` is."""
        return self.epsilon(theta, g, radius, self.norm(theta, g, norm, f), f)

    def norm(
        self, theta: Shards, g: Shards | Lazy, norm: Norm, f: Shards | Lazy | None = None
    ) -> Tensor:
        """||weighted||_2, by the engine's `norm`: collective. f: None means g."""
        return norm(_lazily(self.weighted, theta, g, f))

    def epsilon(
        self,
        theta: Shards,
        g: Shards | Lazy,
        radius: Tensor | float,
        norm: Tensor,
        f: Shards | Lazy | None = None,
    ) -> Lazy:
        """radius * direction / norm, computed part by part when it is read: theta, g and f must
        last until then."""
        coefficient = radius / (norm + TINY)

        def rule(theta: Shards, g: Shards, f: Shards) -> Shards:
            return coefficient * self.direction(theta, g, f)

        return _lazily(rule, theta, g, f)


def _lazily(rule: Rule, theta: Shards, g: Shards | Lazy, f: Shards | Lazy | None) -> Lazy:
    if f is None:
        return Lazy(lambda theta, g: rule(theta, g, g), theta, g)
    return Lazy(rule, theta, g, f)


def sam() -> Ascent:
    """epsilon = rho g / ||g||_2 (Foret et al. 2021; the paper's Eq. 2 with T = 1)."""
    return Ascent(lambda theta, g, f: g, lambda theta, g, f: g)


def preconditioned() -> Ascent:
    """epsilon = rho P g / ||P g||_2, 1 / P = sqrt(v) + eps as Adam has them after this g
    (preconditioned SAM and Functional-SAM, Singh et al. 2025; the length is SAM's)."""
    # not linear: f is of the mean gradient, and has this g in it
    divided: Rule = lambda theta, g, f: g / f  # noqa: E731
    return Ascent(divided, divided, linear=False, by_moments=True)


def asam(t: Scale) -> Ascent:
    """epsilon = radius T^2 g / ||T g||_2 (Kwon et al. 2021; the paper's Eq. 2, and Eq. 7 where
    radius is d)."""
    # the norm is of T g and the direction T^2 g, so that |epsilon / T| is the radius
    return Ascent(lambda theta, g, f: t(theta) * g, lambda theta, g, f: squared(t(theta)) * g)


def fisher(eta: float, inverse: str = "one_plus") -> Ascent:
    """epsilon = gamma F^-1 g / sqrt(g F^-1 g) with F = diag(f^2) (Eq. 8-9; Kim et al. 2022).

    inverse: F^-1 = 1 / (1 + eta f^2) (`one_plus`) or 1 / (f^2 + eta) (`plus_eta`).
    """

    def inverted(f: Shards) -> Shards:
        return _metric(f, eta, inverse).reciprocal()

    return Ascent(
        # F^-1/2 g, whose 2-norm is sqrt(g F^-1 g): a norm is what an engine can reduce. Not linear:
        # F is of the mean gradient's squares
        lambda theta, g, f: inverted(f).sqrt() * g,
        lambda theta, g, f: inverted(f) * g,
        linear=False,
    )


def gradient_free(t: Scale) -> Ascent:
    """epsilon = radius T^2 / ||T g||_2, as the paper's released code has it. NOT Eq. 7: no gradient
    in the numerator.

    It is not an ascent direction; it exists to compare with runs of that code, under the name
    `perturbation: released_code_without_gradient`.
    """
    return Ascent(lambda theta, g, f: t(theta) * g, lambda theta, g, f: squared(t(theta)))


def squared(x: Shards) -> Shards:
    """x^2, element by element."""
    return x * x


def _metric(f: Shards, eta: float, inverse: str) -> Shards:
    """F of `fisher`."""
    return squared(f) * eta + 1.0 if inverse == "one_plus" else squared(f) + eta


# (theta, g, epsilon, norm) -> length = radius
EpsilonLength = Callable[[Shards, Shards | Lazy, Shards | Lazy, Norm], Tensor]


def sam_length(theta: Shards, g: Shards | Lazy, epsilon: Shards | Lazy, norm: Norm) -> Tensor:
    """||epsilon||_2."""
    return norm(epsilon)


def asam_length(
    theta: Shards, g: Shards | Lazy, epsilon: Shards | Lazy, norm: Norm, *, t: Scale
) -> Tensor:
    """||epsilon / T||_2, where T = 0 adds nothing."""
    return norm(
        Lazy(
            # 0 / 0 where T is 0, and epsilon with it: that element stands still
            lambda theta, e: (e / t(theta)).map(lambda _, x: x.nan_to_num(0.0, 0.0, 0.0)),
            theta,
            epsilon,
        )
    )


def fisher_length(
    theta: Shards, g: Shards | Lazy, epsilon: Shards | Lazy, norm: Norm, *, eta: float, inverse: str
) -> Tensor:
    """sqrt(epsilon F epsilon)."""
    return norm(Lazy(lambda g, e: _metric(g, eta, inverse).sqrt() * e, g, epsilon))


def _samsung(span: Span, piece: Tensor, eta: float) -> Tensor:
    """SamsungLabs/ASAM: |w| + eta where the name says weight, 1 elsewhere. Spans keep that name in
    every layout."""
    return abs(piece) + eta if "weight" in span.name else piece.new_ones(piece.shape)


def _matrices(span: Span, piece: Tensor) -> Tensor:
    """|w| for matrices, 0 for biases and norms, which otherwise take ~99 % of |epsilon|^2: only
    matrices are perturbed."""
    return abs(piece) if len(span.shape) > 1 else piece.new_zeros(piece.shape)


def _norms(span: Span, piece: Tensor) -> Tensor:
    """|w| for weights and biases of normalisation layers, 0 elsewhere (SAM-ON, Mueller et al.
    2023)."""
    return abs(piece) if span.kind == "norm" else piece.new_zeros(piece.shape)


def adaptive_scale(name: str, samsung_eta: float = 0.01) -> Scale:
    """T of ASAM and TRAM as a function of theta, for `adaptive_filter: all, matrices, norms,
    samsung`."""
    filters: Mapping[str, Scale] = {
        "all": abs,
        "matrices": lambda theta: theta.map(_matrices),
        "norms": lambda theta: theta.map(_norms),
        "samsung": lambda theta: theta.map(partial(_samsung, eta=samsung_eta)),
    }
    return filters[name]

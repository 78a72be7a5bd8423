"""Ascent directions: (theta, g, radius, norm) -> epsilon, pure functions of the shards a rank owns.

`norm` is the engine's global norm: the only communication. `radius` is a Python number or a () tensor, the same on
every rank. Every epsilon has <epsilon, g> >= 0, and radius 0 gives epsilon 0 exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from torch import Tensor

from tram_ds.shards import Shards, Span

TINY = 1e-12  # keeps 0 / 0 out of a step whose gradient vanishes; every public SAM uses this value

Norm = Callable[[Shards], Tensor]


class Ascent(Protocol):
    """What every ascent is called as."""

    def __call__(self, theta: Shards, g: Shards, radius: Tensor | float, norm: Norm, /) -> Shards: ...


def sam(theta: Shards, g: Shards, radius: Tensor | float, norm: Norm) -> Shards:
    """epsilon = rho g / ||g||_2 (Foret et al. 2021; the paper's Eq. 2 with T = 1)."""
    return (radius / (norm(g) + TINY)) * g


def asam(theta: Shards, g: Shards, radius: Tensor | float, norm: Norm, *, scale: Callable[[Shards], Shards]) -> Shards:
    """epsilon = radius T^2 g / ||T g||_2 (Kwon et al. 2021; the paper's Eq. 2, and Eq. 7 where radius is d)."""
    t = scale(theta)
    tg = t * g
    return (radius / (norm(tg) + TINY)) * (t * tg)


def fisher(
    theta: Shards,
    g: Shards,
    radius: Tensor | float,
    norm: Norm,
    *,
    eta: float,
    inverse: str = "one_plus",
    curvature: Shards | None = None,
) -> Shards:
    """epsilon = gamma F^-1 g / sqrt(g F^-1 g) with F = diag(f), f = curvature^2 (Eq. 8-9; Kim et al. 2022).

    curvature: the gradient whose square estimates the Fisher diagonal; None means g itself.
    inverse: F^-1 = 1 / (1 + eta f) (`one_plus`) or 1 / (f + eta) (`plus_eta`).
    """
    f = (g if curvature is None else curvature) * (g if curvature is None else curvature)
    r = (f * eta + 1.0).reciprocal() if inverse == "one_plus" else (f + eta).reciprocal()
    root = r.map(lambda _, piece: piece.sqrt())
    return (radius / (norm(root * g) + TINY)) * (r * g)


def gradient_free(theta: Shards, g: Shards, radius: Tensor | float, norm: Norm, *, scale: Callable[[Shards], Shards]) -> Shards:
    """epsilon = radius T^2 / ||T g||_2, as the paper's released code has it. NOT Eq. 7: no gradient in the numerator.

    It is not an ascent direction; it exists to compare with runs of that code, under the name
    `perturbation: released_code_without_gradient`.
    """
    t = scale(theta)
    return (radius / (norm(t * g) + TINY)) * (t * t)


Gauge = Callable[[Shards, Shards, Shards, Norm], Tensor]  # (theta, g, epsilon, norm) -> length, equal to the radius


def sam_length(theta: Shards, g: Shards, epsilon: Shards, norm: Norm) -> Tensor:
    """||epsilon||_2."""
    return norm(epsilon)


def asam_length(theta: Shards, g: Shards, epsilon: Shards, norm: Norm, *, scale: Callable[[Shards], Shards]) -> Tensor:
    """||epsilon / T||_2, where T = 0 adds nothing."""
    t = scale(theta)
    return norm((epsilon / t).map(lambda _, piece: piece.nan_to_num(0.0, 0.0, 0.0)))


def fisher_length(theta: Shards, g: Shards, epsilon: Shards, norm: Norm, *, eta: float, inverse: str) -> Tensor:
    """sqrt(epsilon F epsilon)."""
    f = g * g * eta + 1.0 if inverse == "one_plus" else g * g + eta
    return norm(f.map(lambda _, piece: piece.sqrt()) * epsilon)


def _samsung(span: Span, piece: Tensor, eta: float) -> Tensor:
    """SamsungLabs/ASAM: |w| + eta where the name says weight, 1 elsewhere. Spans keep that name in every layout."""
    return abs(piece) + eta if "weight" in span.name else piece.new_ones(piece.shape)


def _matrices(span: Span, piece: Tensor) -> Tensor:
    """|w| for matrices, 0 for biases and norms, which otherwise take ~99 % of |epsilon|^2: only matrices are perturbed."""
    return abs(piece) if len(span.shape) > 1 else piece.new_zeros(piece.shape)


def adaptive_scale(name: str, samsung_eta: float = 0.01) -> Callable[[Shards], Shards]:
    """T of ASAM and TRAM as a function of theta, for `adaptive_filter: all, matrices, samsung`."""
    filters: Mapping[str, Callable[[Shards], Shards]] = {
        "all": abs,
        "matrices": lambda theta: theta.map(_matrices),
        "samsung": lambda theta: theta.map(partial(_samsung, eta=samsung_eta)),
    }
    return filters[name]

"""The loss along random directions through the weights, filter-normalised (Li et al. 2018).

Each direction is N(0, 1) and then every filter of it (the weights of one output unit, the vector of
one token) is scaled to the norm of the model's own filter, so that flat and sharp mean the same for
models whose weights differ in scale. Biases and normalisation weights stay fixed, as in the
authors' code.

Under sharding a filter may be cut between ranks. Its norm is then a sum over ranks: every rank adds
the squares of the elements it owns into one vector with an entry per filter of the model, and one
all-reduce completes all of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards, Span
from tram_ds.runtime.checked import Positive, Section
from tram_ds.surface.sharpness import Above0
from tram_ds.surface.subject import Subject, parameter_shapes, random_direction, shard_sum


class Options(Section):
    """Settings of the measurement."""

    radius: Above0 = 1.0
    """How far to go along a direction: 1 moves every filter by its own norm."""
    points: Annotated[int, Field(ge=3)] = 21
    """Losses along the line, ends included; odd numbers have the weights themselves among them."""
    plane_points: Annotated[int, Field(ge=0)] = 11
    """Losses along each side of the plane; 0 = no plane."""
    normalise: Literal["filter", "parameter"] = "filter"
    """What is scaled to the model's own norm: each filter, or each parameter as a whole."""
    vectors: Literal["fixed", "scaled"] = "fixed"
    """Biases and normalisation weights: left where they are, or moved as one filter each."""
    rows: Positive | None = 512
    """Rows of the split the loss is taken over, from its beginning; null = all."""


def measure(subject: Subject, options: Options) -> dict[str, Any]:
    """{at, line, plane} and the options: losses at theta + a d1, and plane[i][j] at theta +
    at_plane[i] d1 + at_plane[j] d2.

    d1 and d2 are the same for every domain. Collective; the weights are as before afterwards.
    """
    subject = subject.first(options.rows)
    engine, theta = subject.engine, subject.engine.params(keep=True)
    first, second = (
        direction(engine, subject.seed, name, options) for name in ("landscape 1", "landscape 2")
    )
    at, at_plane = (steps(options.radius, n) for n in (options.points, options.plane_points))
    line = [subject.loss(theta + first * a) for a in at]
    plane = [[subject.loss(theta + first * a + second * b) for b in at_plane] for a in at_plane]
    found = {"at": at, "line": line, "at_plane": at_plane, "plane": plane}
    return found | options.model_dump() | {"rows": subject.rows}


def steps(radius: float, points: int) -> list[float]:
    """`points` numbers from -radius to radius, the middle one exactly 0."""
    if points < 2:
        return [0.0] * points
    return [radius * (2 * i - (points - 1)) / (points - 1) for i in range(points)]


@dataclass(frozen=True)
class Filters:
    """How a parameter is cut into filters: element e belongs to filter e // width, or e % count
    where they are columns."""

    count: int
    width: int
    columns: bool = False

    def of(self, span: Span, device: torch.device) -> Tensor:
        """(span.length,) int64: the filter of each element of a piece."""
        position = torch.arange(span.start, span.start + span.length, device=device)
        return position % self.count if self.columns else position // self.width


def filters(engine: Engine, normalise: str) -> dict[str, Filters]:
    """Every trainable parameter's filters, in the same order on every rank. Rows, but columns of
    GPT-2's transposed Conv1D."""
    found = {}
    for name, shape in parameter_shapes(engine).items():
        size = math.prod(shape)
        whole = normalise == "parameter" or len(shape) < 2 or not size
        # transformers' Conv1D stores (in, out), the other way round than nn.Linear
        columns = isinstance(engine.module.get_submodule(name.rpartition(".")[0]), Conv1D)
        count = 1 if whole else shape[1 if columns else 0]
        found[name] = Filters(count, max(size // count, 1), columns and not whole)
    return found


def direction(engine: Engine, seed: int, name: str, options: Options) -> Shards:
    """A filter-normalised random direction in the layout of params(), a function of seed, name and
    weights alone. Collective."""
    random, cut = random_direction(engine, seed, name), filters(engine, options.normalise)
    own, drawn = (filter_norms(engine, x, cut) for x in (engine.params(), random))

    def scaled(span: Span, piece: Tensor) -> Tensor:
        if len(span.shape) < 2 and options.vectors == "fixed":
            return torch.zeros_like(piece)
        # 1e-10: as in the authors' code, against a filter of zeros
        scale = own[span.name] / (drawn[span.name] + 1e-10)
        return piece * scale[cut[span.name].of(span, piece.device)].to(piece.dtype).view(
            piece.shape
        )

    return random.map(scaled)


def filter_norms(engine: Engine, x: Shards, cut: Mapping[str, Filters]) -> dict[str, Tensor]:
    """Parameter -> (filters,) float64 2-norms on the shards' device, complete on every rank. One
    sum over shard_group."""
    device = x[0].device if len(x) else engine.device
    squares = {
        name: torch.zeros(f.count, dtype=torch.float64, device=device) for name, f in cut.items()
    }
    for span, piece in zip(x.layout, x, strict=True):
        squares[span.name].index_add_(
            0, cut[span.name].of(span, device), piece.reshape(-1).double().square()
        )
    # one sum for all parameters: a small collective each would cost its latency each
    total = shard_sum(engine, torch.cat(list(squares.values()))).to(device).sqrt()
    return dict(zip(squares, total.split([f.count for f in cut.values()]), strict=True))


def plot(results: Mapping[str, Mapping[str, Any]], folder: Path, title: str) -> list[Path]:
    """Draws landscape.png and .svg (all domains) and landscape-DOMAIN.png and .svg into `folder`;
    returns the files. Rank 0."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="distance along the direction, in filter norms", ylabel="loss (nats)", title=title
    )
    for domain, found in results.items():
        axes.plot(found["at"], found["line"], label=domain, linewidth=1.5)
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.legend(fontsize="small", ncols=1 + len(results) // 9)
    files = _save(figure, folder / "landscape")
    for domain, found in results.items():
        if found["plane"]:
            figure = _plane(found, f"{title}: loss on {domain}")
            files += _save(figure, folder / f"landscape-{_cut(domain)}")
    return files


def _plane(found: Mapping[str, Any], title: str) -> Any:
    """A figure of one domain's losses over the plane."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="direction 1", ylabel="direction 2", title=title, aspect="equal"
    )
    at = found["at_plane"]
    losses = torch.tensor(found["plane"]).T.numpy()  # contour wants rows along y
    axes.clabel(axes.contour(at, at, losses, levels=12, linewidths=0.8, colors="0.2"))
    filled = axes.contourf(at, at, losses, levels=24, alpha=0.8)
    figure.colorbar(filled, label="loss (nats)")
    axes.plot(0, 0, marker="+", color="black", markersize=10)
    return figure


def _cut(domain: str, longest: int = 100) -> str:
    """The domain's name; of one that a longer file's name has no room for the beginning and a
    checksum."""
    raw = domain.encode()
    if len(raw) <= longest:
        return domain
    return f"{raw[:longest].decode(errors='ignore')}-{zlib.crc32(raw):08x}"


def _save(figure: Any, stem: Path) -> list[Path]:
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files

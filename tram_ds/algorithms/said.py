"""What is said once a run: that a step was, without an error, no more than the base optimizer's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tram_ds.algorithms.algorithm import Algorithm
from tram_ds.algorithms.options import Radius, sized_by_rho
from tram_ds.algorithms.reference import Previous, WeightReference
from tram_ds.algorithms.step import StepReport
from tram_ds.algorithms.trust_region import TrustRegion

NO_DISTANCE = (
    "the distance of step {step} is exactly 0, so nothing is perturbed and the step is the base "
    "optimizer's: the reference says what the model says (does the noise reach the model? does the "
    "learning rate move the weights?)"
)
NO_EFFECT = (
    "the loss of step {step} at theta + epsilon is bit for bit the loss at theta, so the step is "
    "the base optimizer's: the perturbation is below the weights' precision (a larger rho or "
    "radius_scale), or the loss does not depend on them"
)
NO_DROPOUT = (
    "the model has no active dropout, so {what} of {row} is {movement} alone{cause}: hardly more "
    "than the base optimizer's step. Measure it (launch/analyze.py --what effect), {way}, "
    "turn dropout on in the model's config, or choose asam or tram_x"
)


def dropout_is_active(module: nn.Module) -> bool:
    """Whether a layer in train mode drops anything, as far as the layers say: by their type, or by
    a number above 0 under a name with `drop` in it, as attention keeps it."""
    for part in module.modules():
        named = [v for k, v in vars(part).items() if "drop" in k and isinstance(v, float)]
        named += [part.p] if isinstance(part, nn.modules.dropout._DropoutNd) else []
        if part.training and any(value > 0 for value in named):
            return True
    return False


def without_dropout(row: Algorithm) -> str | None:
    """What to say of `row` on a model without active dropout; None where it makes no difference:
    a reference at earlier weights then differs by their movement alone."""
    for region, what, way in (
        (row.radius, "the radius", "give it a size (algorithm.radius=relative)"),
        (row.penalty, "the penalty", "raise algorithm.weight"),
    ):
        if not isinstance(region, TrustRegion):
            continue
        if region is row.radius and sized_by_rho(row.of(Radius)):
            continue
        reference = region.reference
        if isinstance(reference, Previous):
            movement, cause = "the last step's movement", ", which goes with the learning rate"
        elif isinstance(reference, WeightReference):
            movement, cause = MOVEMENTS[reference.name], ", nothing at first"
        else:
            continue
        return NO_DROPOUT.format(what=what, row=row.name, movement=movement, cause=cause, way=way)
    return None


MOVEMENTS = {
    "initial": "the movement since the start",
    "average": "the distance of the weights from their average",
}


@dataclass
class Said:
    """Looks at every step, on a GPU one step later: by then the copy of its flags is there, and
    nothing has waited for the device."""

    messages: set[str] = field(default_factory=set)
    pending: tuple[int, Tensor] | None = None
    started: bool = False

    def start(self, algorithm: Algorithm, module: nn.Module) -> None:
        """Before the first step: what the model makes of the row."""
        if self.started:
            return
        self.started = True
        text = without_dropout(algorithm)
        if text is not None and (
            algorithm.of(Radius).student_mode == "eval" or not dropout_is_active(module)
        ):
            warnings.warn(text, stacklevel=4)

    def note(self, step: int, algorithm: Algorithm, report: StepReport) -> None:
        """step: counted from 0."""
        self.read()
        if algorithm.ascent is None or len(self.messages) == 2:
            return
        # at step 0 theta_{-1} is theta_0, and d is 0 as it should be
        measured = isinstance(algorithm.radius, TrustRegion) and step > 0
        silent = report.distance == 0 if measured else torch.zeros_like(report.loss).bool()
        unmoved = (report.loss == report.perturbed_loss) & (report.radius != 0)
        flags = torch.stack([silent, unmoved])
        # read at the next step: .tolist() here would wait for this one's passes
        self.pending = step, flags.to("cpu", non_blocking=True)
        if not flags.is_cuda:
            self.read()

    def read(self) -> None:
        """Says what the last step was found to be."""
        if self.pending is None:
            return
        (step, flags), self.pending = self.pending, None
        for message, found in zip((NO_DISTANCE, NO_EFFECT), flags.tolist(), strict=True):
            if found and message not in self.messages:
                self.messages.add(message)
                warnings.warn(message.format(step=step + 1), stacklevel=4)

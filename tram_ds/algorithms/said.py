"""What is said once a run: that a step was, without an error, no more than the base optimizer's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tram_ds.algorithms.step import StepReport
from tram_ds.algorithms.table import Algorithm
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


@dataclass
class Said:
    """Looks at every step, on a GPU one step later: by then the copy of its flags is there, and
    nothing has waited for the device."""

    messages: set[str] = field(default_factory=set)
    pending: tuple[int, Tensor] | None = None

    def note(self, step: int, algorithm: Algorithm, report: StepReport) -> None:
        """step: counted from 0."""
        self.read()
        if algorithm.ascent is None or len(self.messages) == 2:
            return
        measured = isinstance(algorithm.radius, TrustRegion) and step > 0
        silent = report.distance == 0 if measured else torch.zeros_like(report.loss).bool()
        unmoved = (report.loss == report.perturbed_loss) & (report.radius != 0)
        flags = torch.stack([silent, unmoved])
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

"""What the float64 oracle says of the parity problem, computed once for all that ask the same: each
rank of each engine does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.parity import problem
from tests.parity.reference import Oracle
from tram_ds.runtime.locks import locked


@dataclass(frozen=True)
class Question:
    """All that the oracle's weights depend on. micros: of a whole step, over all ranks; device: the
    noise that is drawn depends on it."""

    algorithm: str
    micros: int
    tied: bool = True
    adapted: bool = False
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> torch.nn.Module:
        return problem.adapted() if self.adapted else problem.model(tied=self.tied)

    @property
    def lr(self) -> float:
        return problem.LR_OF_ADAPTERS if self.adapted else problem.LR


@dataclass(frozen=True)
class Answer:
    """(loss, distance, loss at theta + epsilon) of each step, and theta after the last."""

    reports: list[tuple[float, float, float]]
    theta: dict[str, torch.Tensor]


Ask = Callable[[Question], Answer]


def computed(question: Question) -> Answer:
    device = torch.device(question.device)
    double = problem.double(question.model()).to(device)
    oracle = Oracle(
        double,
        problem.forward,
        question.algorithm,
        lr=question.lr,
        seed=problem.SEED,
        embedding=double.get_input_embeddings(),
        **question.options,
    )
    steps = problem.global_batches(micros=question.micros, device=device)
    found = [oracle.step(batches) for batches in steps]
    reports = [(float(loss), float(d), float(perturbed)) for loss, d, perturbed in found]
    return Answer(reports, oracle.theta)


def kept_in(folder: Path) -> Ask:
    """`computed`, but what is in `folder` already, of this process or another: each answer is a
    file, which its first asker writes while the others wait."""

    def ask(question: Question) -> Answer:
        name = hashlib.sha256(repr(question).encode()).hexdigest()[:24]
        path = folder / f"{name}.pt"
        with locked(folder / f"{name}.lock"):  # the kernel lets go of it when a rank dies
            if not path.exists():
                unfinished = path.with_suffix(".part")
                torch.save((question, computed(question)), unfinished)
                unfinished.replace(path)  # whole or not there
        kept, answer = torch.load(path, weights_only=False, map_location=question.device)
        assert kept == question, "two questions of one name"
        return answer

    return ask

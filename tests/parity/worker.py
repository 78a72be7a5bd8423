"""`python -m tests.parity.worker OUT ANSWERS ENGINE`: the whole algorithm table inside one process
group, beside what the oracle says, which is kept in the folder ANSWERS."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.parity import answers, build, problem
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.models.chunked import chunkable

# rules of the radius that remember distances, of which the third step's is out of the calibration;
# a descent on x + z; an ascent by norms alone; one that Adam's second moments precondition
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "asam": {"norms": {"adaptive_filter": "norms", "rho": 2.0}},
    "functional_sam": {"precondition": {"precondition": True}},
    "tram_prev": {"relative": {"radius_scale": None, "radius": "relative", "rho": 0.2}},
    "tram_x": {
        "auto": {"radius_scale": "auto", "calibration_steps": 2, "rho": 0.2},
        "descent_noise": {"descent_noise": True, "sigma": 0.5},
    },
}


# theta is adapters alone: theta_0 is the model without them, the average one of adapters
ADAPTED = ("tram_init", "asam_mesa")


def relative_error(built: Any, theta: dict[str, torch.Tensor]) -> float:
    """Largest |theta - oracle| / max|oracle| over parameters and ranks."""
    worst = 0.0
    shards = built.engine.params()
    for span, piece in zip(shards.layout, shards, strict=True):
        want = theta[span.name].flatten()[span.start : span.start + span.length]
        if span.length:
            worst = max(
                worst,
                float((piece.flatten().double() - want).abs().max() / theta[span.name].abs().max()),
            )
    return build.gather(worst)


def frozen_change(built: Any, double: torch.nn.Module) -> float:
    """Largest change of a weight that does not train."""
    before, worst = dict(double.named_parameters()), 0.0
    frozen = built.engine.weights.frozen()
    assert frozen.layout or all(p.requires_grad for p in double.parameters())
    for span, piece in zip(frozen.layout, frozen, strict=True):
        want = before[span.name].flatten()[span.start : span.start + span.length]
        if span.length:
            worst = max(worst, float((piece.flatten().double() - want).abs().max()))
    return build.gather(worst)


@problem.few_rows()
def compare(
    engine: str,
    algorithm: str,
    micros: int,
    rank: int,
    world: int,
    mutate: Any = None,
    lean: bool = False,
    adapted: bool = False,
    device: torch.device = build.CPU,
    ask: answers.Ask = answers.computed,
    **extra: Any,
) -> dict:
    """Runs the engine beside the oracle's answer; {"theta": relative error, "loss", "distance",
    "perturbed_loss": absolute}.

    lean: the engine takes its logits in chunks and looks ahead at the next batch, the oracle does
    neither. device: of both, for what noise is drawn depends on it.
    """
    given = {**problem.OPTIONS.get(algorithm, {}), **extra}  # None: not given after all
    options = {k: v for k, v in given.items() if v is not None}
    question = asked(engine, algorithm, world * micros, adapted, device, options)
    model, answer = question.model(), ask(question)
    own = {"optimizer": functools.partial(torch.optim.SGD, lr=question.lr)} if adapted else {}
    if options.get("precondition"):
        own = {"optimizer": problem.adam}
    double = problem.double(model).to(device)
    built = build.stepper(engine, model, algorithm, micros, device=device, **own, **options)
    if mutate:
        mutate(built)
    row = {"theta": 0.0, "loss": 0.0, "distance": 0.0, "perturbed_loss": 0.0, "moved": 0.0}
    forward = problem.chunked_forward() if lean else problem.forward
    assert chunkable(built.engine.module)  # or a recipe would take its logits whole
    steps = problem.global_batches(micros=world * micros, device=device)
    for step, wanted in enumerate(answer.reports):
        mine = [b[rank * micros : (rank + 1) * micros] for b in steps[step : step + 2]]
        report = built.step(
            mine[0], forward, problem.counts, upcoming=mine[1] if lean and len(mine) == 2 else None
        )
        for key, want in zip(("loss", "distance", "perturbed_loss"), wanted, strict=True):
            row[key] = max(row[key], abs(float(getattr(report, key)) - want))
    row["theta"] = relative_error(built, answer.theta)
    row["moved"] = relative_error(built, dict(double.named_parameters()))
    row["frozen"] = frozen_change(built, double)
    build.stop(built)
    return row


def asked(
    engine: str,
    algorithm: str,
    micros: int,
    adapted: bool,
    device: torch.device,
    options: dict[str, Any],
) -> answers.Question:
    """What the oracle is to say beside `engine`: of `perturbation` it knows the paper's alone."""
    own = {k: v for k, v in options.items() if k != "perturbation"}
    if options.get("precondition"):
        own["adam"] = problem.ADAM
    return answers.Question(algorithm, micros, "untied" not in engine, adapted, str(device), own)


def table(
    engine: str, names: Sequence[str], accumulations: Sequence[int], run: Callable[..., dict]
) -> dict[str, dict]:
    """Every row and form: `run` is compare() but for the engine's, the row's and the form's
    arguments."""
    rows = {f"{a}/{k}": run(engine, a, k) for a in names for k in accumulations}
    rows |= {f"{a}/lean": run(engine, a, 2, lean=True) for a in names}
    rows |= {
        f"{a}/adapted": run(engine, a, 2, adapted=True, lean=True)
        for a in ADAPTED
        if engine in build.ADAPTED and a in names
    }
    for a in (name for name in names if name in FORMS):
        for form, options in FORMS[a].items():
            rows[f"{a}/{form}"] = run(engine, a, 2, **options)
    return rows


def main(out: str, kept: str, engine: str, *algorithms: str) -> None:
    rank, world = build.start(engine)
    accumulations = (1, 2) if engine in build.MATRIX else (2,)
    names = algorithms or tuple(ALGORITHMS)
    run = functools.partial(compare, rank=rank, world=world, ask=answers.kept_in(Path(kept)))
    rows = table(engine, names, accumulations, run)
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

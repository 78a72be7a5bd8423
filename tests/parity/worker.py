"""`python -m tests.parity.worker OUT ENGINE`: the whole algorithm table inside one process
group."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.parity import build, problem
from tests.parity.reference import Oracle
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
    **extra: Any,
) -> dict:
    """Runs engine and oracle side by side; {"theta": relative error, "loss", "distance",
    "perturbed_loss": absolute}.

    lean: the engine takes its logits in chunks and looks ahead at the next batch, the oracle does
    neither. device: of both, for what noise is drawn depends on it.
    """
    given = {**problem.OPTIONS.get(algorithm, {}), **extra}  # None: not given after all
    model = problem.adapted() if adapted else problem.model(tied="untied" not in engine)
    lr = problem.LR_OF_ADAPTERS if adapted else problem.LR
    own = {"optimizer": functools.partial(torch.optim.SGD, lr=lr)} if adapted else {}
    options = {k: v for k, v in given.items() if v is not None}
    oracle_options = {k: v for k, v in options.items() if k not in ("perturbation",)}
    if options.get("precondition"):
        own, oracle_options = {"optimizer": problem.adam}, {**oracle_options, "adam": problem.ADAM}
    double = problem.double(model).to(device)
    oracle = Oracle(
        double,
        problem.forward,
        algorithm,
        lr=lr,
        seed=problem.SEED,
        embedding=double.get_input_embeddings(),
        **oracle_options,
    )
    built = build.stepper(engine, model, algorithm, micros, device=device, **own, **options)
    if mutate:
        mutate(built)
    row = {"theta": 0.0, "loss": 0.0, "distance": 0.0, "perturbed_loss": 0.0, "moved": 0.0}
    forward = problem.chunked_forward() if lean else problem.forward
    assert chunkable(built.engine.module)  # or a recipe would take its logits whole
    steps = problem.global_batches(micros=world * micros, device=device)
    for step, batches in enumerate(steps):
        loss, distance, perturbed = oracle.step(batches)
        mine = [b[rank * micros : (rank + 1) * micros] for b in steps[step : step + 2]]
        report = built.step(
            mine[0], forward, problem.counts, upcoming=mine[1] if lean and len(mine) == 2 else None
        )
        pairs = {"loss": loss, "distance": distance, "perturbed_loss": perturbed}
        for key, want in pairs.items():
            row[key] = max(row[key], abs(float(getattr(report, key)) - float(want)))
    row["theta"] = relative_error(built, oracle.theta)
    row["moved"] = relative_error(built, oracle.initial)
    row["frozen"] = frozen_change(built, double)
    build.stop(built)
    return row


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


def main(out: str, engine: str, *algorithms: str) -> None:
    rank, world = build.start(engine)
    accumulations = (1, 2) if engine in build.MATRIX else (2,)
    names = algorithms or tuple(ALGORITHMS)
    rows = table(engine, names, accumulations, functools.partial(compare, rank=rank, world=world))
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    build.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])

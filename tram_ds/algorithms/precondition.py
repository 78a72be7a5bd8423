"""What Adam divides a gradient by: the preconditioner of an ascent."""

from __future__ import annotations

from tram_ds.engines.optimizer_refusals import refuse_without_second_moment
from tram_ds.engines.optimizer_state import SECOND_MOMENT
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Lazy, Shards


def denominator(engine: Engine) -> Lazy:
    """sqrt(v) + eps, fp32 and as Adam would have them if it took its step by the last pass's
    gradient g: v = (beta_2 v_before + (1 - beta_2) g^2) / (1 - beta_2^t).

    With g in it, because v_before is 0 for what no batch has reached yet (the embedding of a word
    seen for the first time, everything at step 1), and g / eps there would be all of epsilon. Reads
    the engine's gradient when it is read. Local.
    """
    # one for all: refuse_without_second_moment has refused groups that differ
    group = engine.weights.optimizer.param_groups[0]
    beta, eps = float(group["betas"][1]), float(group["eps"])
    before = engine.moments().get(SECOND_MOMENT)
    # + 1: Adam counts its step before it corrects by it
    corrected = 1.0 / (1.0 - beta ** (engine.steps + 1))
    g = engine.grads()
    if before is None:
        if engine.steps:  # an optimizer that does not show its state before its first step
            refuse_without_second_moment(engine.weights.optimizer, set(engine.moments()))
        return Lazy(lambda g: (g * g * ((1.0 - beta) * corrected)).sqrt() + eps, g)

    def after(g: Shards, v: Shards) -> Shards:
        return ((v.wide() * beta + g * g * (1.0 - beta)) * corrected).sqrt() + eps

    return Lazy(after, g, before)

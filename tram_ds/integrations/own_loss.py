"""Which ready forward a Hugging Face model takes, and whether its loss is the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tram_ds.algorithms.stepper import UserForward
from tram_ds.integrations.forwards import causal_lm, classification
from tram_ds.models.output import checked
from tram_ds.models.passes import evaluating
from tram_ds.runtime.peers import agreed

CLOSE = 1e-3  # relative: the two round in another order


def forward_of(model: nn.Module) -> UserForward:
    """The ready forward of the model's class, seen through PEFT and FSDP2. ValueError for other
    classes."""
    from transformers.models.auto import modeling_auto as auto

    inner: Any = model
    # PEFT's wrapper is a class of its own around the model's
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    # fully_shard makes a class of its own, before the model's
    name = next(k for k in type(inner).__mro__ if not issubclass(k, FSDPModule)).__name__
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return causal_lm
    classifiers = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    )
    if any(name in names.values() for names in classifiers):
        return classification
    raise ValueError(
        f"{name} is no causal language model and no classifier of transformers: pass forward=, "
        "(model, batch) -> (loss_sum, count, logits (N, C))"
    )


def refuse_other_loss(forward: UserForward, model: Any, batch: Any, world_size: int) -> None:
    """ValueError, on every rank, where on any the model's own loss of its batch is another, so that
    training would leave something out. One pass each, without dropout. Collective."""
    # a loss at the border may pass on one rank and not on another, which would wait for it
    agreed(world_size, lambda: _refuse(forward, model, batch))


def _refuse(forward: UserForward, model: Any, batch: Any) -> None:
    assert callable(forward)
    with torch.no_grad(), evaluating(model):
        # no-grad and eval: DDP waits for no backward, and both see the same model
        ours = checked(forward(model, batch))
        own = model(**batch).loss
    if not float(ours.count) or own is None:
        return
    mine, theirs = float(ours.loss_sum) / float(ours.count), float(own)
    # what a model of FSDP2's bf16 returns is rounded once more, its loss as well
    if abs(mine - theirs) > max(CLOSE, torch.finfo(own.dtype).eps) * abs(theirs):
        raise ValueError(
            f"the model's own loss is {theirs:.6g}, the cross-entropy of its labels {mine:.6g}: "
            "pass forward=, (model, batch) -> (loss_sum, count, logits (N, C)), with the loss that "
            "you mean"
        )

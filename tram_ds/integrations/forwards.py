"""Ready `forward`s for wrap(): Hugging Face models on the batches that their collators make.

The loss is the one that the model itself computes of `labels`, summed instead of averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tram_ds.models.logit_chunks import IGNORED  # of transformers too
from tram_ds.models.output import Output


def causal_lm(model: Any, batch: Mapping[str, Any]) -> Output:
    """Next-token prediction: `labels` (B, T) are shifted here, as transformers shifts them;
    `shift_labels` (B, T) are taken as they are.

    Compared are all positions but padding (attention_mask 0).
    """
    targets = batch.get("shift_labels")
    if targets is None:
        # padded on the right, so that targets stand at the positions that predict them
        targets = F.pad(_labels(batch)[:, 1:], (0, 1), value=IGNORED)
    logits = _logits(model, batch)  # (B, T, C)
    counted = targets != IGNORED
    # fp32, as transformers' own losses take it
    loss_sum = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    mask = batch.get("attention_mask")
    if mask is None:
        return Output(
            loss_sum, counted.sum(), logits.flatten(0, 1), len(targets), counted.flatten()
        )
    if mask.shape != targets.shape:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)} and labels are {tuple(targets.shape)}: which "
            "positions are padding? Give a mask (B, T), or write a forward of your own"
        )
    # a counted target behind the mask too: else it would be in the loss and in no comparison
    valid = mask.bool() | counted
    return Output(loss_sum, counted.sum(), logits[valid], len(targets), counted[valid])


def classification(model: Any, batch: Mapping[str, Any]) -> Output:
    """One class per example, of text, images or sound: `labels` (B,) whole numbers."""
    labels = _labels(batch)
    logits = _logits(model, batch)  # (B, C)
    if labels.is_floating_point() or labels.dim() != 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"labels {tuple(labels.shape)} of {labels.dtype} for logits {tuple(logits.shape)}: "
            "classification has one whole-numbered label per example (regression and several "
            "labels need a forward of your own)"
        )
    counted = labels != IGNORED
    loss_sum = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return Output(loss_sum, counted.sum(), logits, len(labels), counted)


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if batch.get("labels") is None:
        raise ValueError(
            f"the batch has no labels, only {', '.join(map(str, batch))}: the collator makes them "
            "(DataCollatorForLanguageModeling(mlm=False) for a causal language model)"
        )
    return batch["labels"]


def _logits(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The model is not told the labels: it would compute a loss that nobody reads."""
    found = model(**{k: v for k, v in batch.items() if k not in ("labels", "shift_labels")})
    if getattr(found, "aux_loss", None) is not None:
        raise ValueError(
            "the model has a router loss beside that of its labels, which would be left out: "
            "config.output_router_logits=False, or write a forward of your own"
        )
    return found.logits

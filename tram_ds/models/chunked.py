"""A causal language model's forward pass that never holds its (N, C) logits: N positions, C
vocabulary entries.

The model's output head is asked, inside the model's own forward pass (where every sharded engine
has its weight gathered), for what is needed of the logits instead of for the logits: the loss, the
distances, and their gradient, one chunk of rows after the other; or the hidden states, from which a
chunk of reference logits is made when it is read. The loss and every distance share one product per
chunk, so the step computes what it would compute with whole logits, and keeps none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tram_ds.models.functional import LogitGradient
from tram_ds.models.logit_chunks import IGNORED, LogitChunks, product_dtype
from tram_ds.models.logits import Compare, Hidden
from tram_ds.models.output import Batch, Output

# (states (N, H), weight (C, H), bias (C,)) -> what the head returns
Answer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Chunked:
    """`__call__` gives what a plain forward pass and `logits.measured` give, without logits.

    inputs: batch -> the model's keyword arguments. targets: batch -> (N,) the token each position
    predicts, or IGNORED. ValueError where the model does more to its logits than its output head
    does.
    """

    inputs: Callable[[Batch], dict[str, Any]]
    targets: Callable[[Batch], Tensor]
    verified: bool = field(default=False, init=False)

    def __call__(
        self,
        model: Any,
        batch: Batch,
        compares: Sequence[Compare] = (),
        held: LogitGradient | None = None,
    ) -> Output:
        """held: the gradient of the objective is made of this dL/dlogits, or of the pass's own,
        which is kept in it where it was empty."""
        targets = self.targets(batch)
        counted = targets != IGNORED
        sweep = LogitChunks(
            targets,
            compares,
            Output(targets, counted.sum(), None, len(batch["input_ids"]), counted),
            held,
        )
        with _asked(model, batch.get("attention_mask"), sweep.answer):
            objective = model(**self.inputs(batch)).logits
        # once a run: torch.equal waits for the device
        if not self.verified and not torch.equal(objective.detach(), sweep.total):
            raise ValueError(
                "this model changes its logits after its output head (scaling, capping): set "
                "model.logits: whole"
            )
        self.verified = True
        return sweep.output(objective)

    def predict(self, model: Any, batch: Batch, copy_head: bool) -> Hidden:
        """The hidden states of every position. copy_head: with a copy of the head, for when its
        weights have changed."""
        kept: list[Tensor | None] = [None, None]

        def answer(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            dtype = product_dtype(states, weight)
            if copy_head:
                # copies, in the product's dtype: the weights move before the states are read
                kept[:] = [
                    x if x is None else x.detach().to(dtype, copy=True) for x in (weight, bias)
                ]
            return states.to(dtype)

        with _asked(model, batch.get("attention_mask"), answer):
            return Hidden(model(**self.inputs(batch)).logits, *kept)


def chunkable(model: nn.Module) -> bool:
    """Whether the model has a linear output head to ask."""
    getter = getattr(model, "get_output_embeddings", None)
    kind = None if getter is None else type(getter())
    # a head that is a unit of FSDP2 has a class that fully_shard made, and gathers its weight when
    # it is called
    return kind is nn.Linear or getattr(kind, "__bases__", ()) == (FSDPModule, nn.Linear)


@contextmanager
def _asked(model: Any, mask: Tensor | None, answer: Answer) -> Iterator[None]:
    """Inside, the model's output head returns `answer` of its valid positions. mask: (B, T), 0
    beside padding."""
    # DistributedDataParallel does not hand on the methods of its module
    head: Any = getattr(model, "module", model).get_output_embeddings()

    def forward(states: Tensor) -> Tensor:
        return answer(
            states.flatten(0, 1) if mask is None else states[mask.bool()], head.weight, head.bias
        )

    # On the instance: hooks of the engine that gather the head's weight run around it as before.
    head.forward = forward
    try:
        yield
    finally:
        del head.forward

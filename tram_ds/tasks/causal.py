"""What the tasks of causal language models share: which tokeniser, what a position predicts, what a
forward pass counts, and rows of several domains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tram_ds.data.bpe import source_tokenizer
from tram_ds.data.sources import Source, corpus_digest
from tram_ds.data.tokenize import vocabulary_size
from tram_ds.models.chunked import Chunked, chunkable
from tram_ds.models.logit_chunks import IGNORED
from tram_ds.models.output import Batch, Output
from tram_ds.models.processors import has_tokenizer, load_tokenizer
from tram_ds.runtime.errors import DataError

Row = TypeVar("Row")


def named_tokenizer(task: Any, model: Any) -> Any:
    """The tokeniser of task.tokenizer or model.path; None where neither is given."""
    if task.tokenizer is not None:
        return load_tokenizer(task.tokenizer, key="task.tokenizer")
    if model.path is None:
        return None
    if not has_tokenizer(model.path):
        raise DataError(
            f"model.path '{model.path}' holds no tokeniser; set task.tokenizer to the one it was "
            "trained with"
        )
    return load_tokenizer(model.path, model.revision)


def fresh_tokenizer(task: Any, model: Any, source: Source, reserved: int = 0) -> Any:
    """A tokeniser trained on the source's text, as large as model.init.vocab_size says. reserved:
    entries of it that are left for others."""
    vocabulary = (model.init or {}).get("vocab_size")
    size = {"vocab_size": vocabulary - reserved} if vocabulary else {}
    return source_tokenizer(source, task.cache_dir, **size)


def config_defaults(model: Any, tokenizer: Any, seq_len: int) -> dict[str, Any]:
    """Config fields of a fresh model that follow from the tokeniser and the rows; none for a
    path."""
    if model.path is not None:
        return {}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    positions = {"max_position_embeddings": seq_len}
    return {"vocab_size": vocabulary_size(tokenizer), **positions, **special}


def check_config(config: Any, tokenizer: Any, seq_len: int) -> None:
    """DataError for a model that cannot take the tokeniser's ids or rows of seq_len."""
    vocabulary = vocabulary_size(tokenizer)
    size = config.get_text_config().vocab_size
    if vocabulary > size:
        raise DataError(
            f"the tokeniser has {vocabulary} entries but the model's vocabulary only {size}: "
            "token ids would be "
            "out of range; set task.tokenizer to the model's own tokeniser, or "
            "model.init.vocab_size to its size"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise DataError(
            f"task.seq_len {seq_len} exceeds the model's {positions} positions; set seq_len "
            f"<= {positions}"
        )
    if seq_len < 2:
        raise DataError(f"task.seq_len {seq_len} leaves nothing to predict; set it to 2 or more")


def right_padded(rows: Sequence[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """((B, T) int64 of uneven rows, (B, T) mask of what is theirs), padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max())), fill)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()


def positions(packs: Sequence[Sequence[Any]], length: int) -> Tensor:
    """(B, length) int64: every row of a pack counted from 0, and so is the padding after them. A
    row is a tuple of arrays, one entry a token."""
    found = torch.zeros(len(packs), length, dtype=torch.long)
    for target, pack in zip(found, packs, strict=True):
        own = [len(row[0]) for row in pack]
        for part in target.split([*own, length - sum(own)]):
            part.copy_(torch.arange(len(part)))
    return found


def inputs(batch: Batch) -> dict[str, Any]:
    """What the model is called with. Of a pack positions instead of a mask: transformers keeps rows
    whose positions begin anew from seeing each other, where it is given no mask."""
    beside = "position_ids" if "position_ids" in batch else "attention_mask"
    keys = ("input_ids", beside)
    return {"use_cache": False, **{key: batch[key] for key in keys if key in batch}}


def refuse_seeing(model: nn.Module, seq_len: int) -> None:
    """DataError for a model in which a row of a pack changes what is said of the next one.
    Collective: two forward passes."""
    device = next(model.parameters()).device
    own = min(4, seq_len // 2)
    first, other, second = (torch.arange(own, device=device) + i for i in (0, own, 2 * own))
    places = torch.arange(own, device=device).repeat(2)[None]

    def said(before: Tensor) -> Tensor:
        ids = torch.cat([before, second])[None]
        return model(input_ids=ids, position_ids=places, use_cache=False).logits[0, own:]

    try:
        with torch.no_grad():
            # bit for bit: the same kernels on the same shapes, and only what stands before differs
            sees = not torch.equal(said(first), said(other))
    except TypeError:  # it does not take positions
        sees = True
    if sees:
        raise DataError(
            f"task.packing = true: in a {type(model).__name__} a conversation sees those packed "
            "before it: set task.packing=false, or model.attention=sdpa"
        )


def next_tokens(batch: Batch) -> Tensor:
    """(N,) the token each valid position of the batch predicts, IGNORED for the last of each row
    and beside padding.

    `labels` (B, T) replaces input_ids as targets if the batch has it, IGNORED where nothing is to
    be counted.
    """
    mask = batch.get("attention_mask")
    targets = batch.get("labels", batch["input_ids"])
    if mask is not None:
        targets = targets.masked_fill(mask == 0, IGNORED)
    following = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
    return following.flatten() if mask is None else following[mask.bool()]


def output(model: nn.Module, batch: Batch) -> Output:
    """A forward pass with whole logits, of the positions that are not padding."""
    mask = batch.get("attention_mask")
    logits = model(**inputs(batch)).logits  # (B, T, C)
    logits = logits.flatten(0, 1) if mask is None else logits[mask.bool()]  # (N, C)
    targets = next_tokens(batch)
    # fp32, also of a bf16 copy, whose 8 bits are too few for a sum over a vocabulary
    loss_sum = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    counted = targets != IGNORED
    return Output(loss_sum, counted.sum(), logits, rows=len(batch["input_ids"]), counted=counted)


def chunked(model: nn.Module, section: Any) -> Chunked | None:
    """The forward pass without whole logits, where model.logits asks for it and the model's head
    is known."""
    whole = getattr(section, "logits", "chunks") == "whole"
    return None if whole or not chunkable(model) else Chunked(inputs, next_tokens)


def row_sums(found: Output, batch: Batch) -> Tensor:
    """(B, 3) fp64 of every row: the sum of its losses, its counted targets, and 0, for accuracy
    means nothing here."""
    targets, ids, mask = next_tokens(batch), batch["input_ids"], batch.get("attention_mask")
    losses = found.losses
    if losses is None:
        losses = F.cross_entropy(
            found.logits.float(), targets, ignore_index=IGNORED, reduction="none"
        )

    def by_row(of: Tensor) -> Tensor:
        if mask is not None:
            of = torch.zeros_like(ids, dtype=of.dtype).masked_scatter(mask.bool(), of)
        return of.view(ids.shape).sum(1)

    # fp64 before anything is added up: sums in fp32 would differ with the batch size
    loss, count = by_row(losses.double()), by_row((targets != IGNORED).double())
    return torch.stack([loss, count, torch.zeros_like(loss)], 1)


def counts(batch: Batch) -> tuple[int, int]:
    """(counted targets, valid positions)."""
    targets = next_tokens(batch)
    return int((targets != IGNORED).sum()), len(targets)


def perplexity(loss_sum: float, count: float) -> dict[str, float]:
    """Mean loss in nats per counted token, and its exponential: infinite from a loss of 709.8
    on."""
    loss = loss_sum / count
    with np.errstate(over="ignore"):
        # np.exp is infinite where math.exp raises OverflowError
        return {"loss": loss, "perplexity": float(np.exp(loss))}


def parts_read(
    source: Source, train: Sequence[str], evaluated: Sequence[str]
) -> list[tuple[str, str]]:
    """(domain, split) of all that a run reads: the training domains' train, the scored ones' valid
    and test."""
    held_out = [(d, s) for d in evaluated for s in source.splits(d) if s != "train"]
    return [(domain, "train") for domain in train] + held_out


def read_digest(source: Source, train: Sequence[str], evaluated: Sequence[str]) -> str:
    """sha256 (hex) of all that a run reads."""
    return corpus_digest(source, parts_read(source, train, evaluated))


def contents(
    source: Source, train: Sequence[str], evaluated: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Split -> domain -> sha256 (hex) of its text, of all that a run reads."""
    found: dict[str, dict[str, str]] = {}
    for domain, split in parts_read(source, train, evaluated):
        found.setdefault(split, {})[domain] = source.digest(domain, split)
    return found


def joined(parts: Sequence[Sequence[Row]]) -> Sequence[Row]:
    """The rows of several domains one after the other."""
    return parts[0] if len(parts) == 1 else _Joined(parts)


class _Joined(Sequence[Row]):
    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self.parts, self.ends = parts, list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        # right: ends[i] is the first index of the part behind i
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - self.ends[part] + len(self.parts[part])]

"""Language modeling on rows that are read while the run goes: what `task.streaming` makes of a
source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tram_ds.data.cache import digest_of
from tram_ds.data.stream import Stream
from tram_ds.data.streamed import StreamedText, Tape
from tram_ds.data.tokenize import tokenizer_digest
from tram_ds.data.windows import token_ids
from tram_ds.runtime.errors import DataError


def stream_of(
    source: StreamedText,
    domain: str,
    tokenizer: Any,
    recipe: Any,
    document: Sequence[int],
    block: Sequence[int],
) -> Stream:
    """The training rows of a domain. document, block: ids in front of its text, and of each row."""
    task, train = recipe.task, recipe.train
    width = task.seq_len - len(block)
    most = None if task.max_train_tokens is None else task.max_train_tokens // width
    parts = (source.digest(domain, "train"), tokenizer_digest(tokenizer), width, most or "all")
    return Stream(
        lambda place: Tape(source, domain, tokenizer, document, place),
        width,
        block,
        buffer=task.streaming.buffer,
        seed=train.seed,
        global_batch=train.global_batch,
        most=most,
        identity=digest_of(*parts, task.streaming.buffer, *document, *block),
    )


def streamed_tokens(
    source: StreamedText,
    domain: str,
    split: str,
    tokenizer: Any,
    max_tokens: int | None,
    document: Sequence[int],
) -> np.ndarray:
    """(T,) int64: what tram_ds.data.tokenize would keep of a split that is scored, in memory.
    DataError for a split without a file that only a whole reading of the training rows gives."""
    if max_tokens is None and source.held_out(domain, split):
        raise DataError(
            f"task.streaming: the {split} rows of domain '{domain}' are held out of its training "
            "rows, and all would have to be read to find them: set task.max_eval_tokens, which "
            f"takes the first so many tokens of them, or give a file {split}.*"
        )
    parts, count = [np.asarray(document, dtype=np.int64)], len(document)
    for ids in token_ids(source.read(domain, split), tokenizer):
        parts.append(ids if max_tokens is None else ids[: max_tokens - count])
        count += len(parts[-1])
        if max_tokens is not None and count >= max_tokens:
            break
    return np.concatenate(parts)[:max_tokens]

"""Text to tokens on disk, once: a memory-mapped cache keyed by what was read and by what tokenised
it.

The rule: a document is the text of one split of one domain, and its tokens are those of the
tokeniser on the whole document, without special tokens (tram_ds.data.windows), behind the prefix
asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.data.sources import Source
from tram_ds.data.windows import token_ids
from tram_ds.runtime.errors import DataError

VERSION = 2  # raise it when the rule changes: it is part of the cache key
LINE = 1 << 20  # characters


def tokenize(
    source: Source,
    domain: str,
    split: str,
    tokenizer: Any,
    cache_dir: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    prefix: Sequence[int] = (),
) -> np.ndarray:
    """(T,) read-only memory map of the split's token ids, uint16 or uint32; built on first use.

    prefix: ids in front, which count. `max_tokens` stops there: only so much is read, and the
    result is the beginning of the whole.
    Safe when several processes ask at once and when a builder is killed.
    """
    key = digest_of(
        VERSION,
        source.digest(domain, split),
        tokenizer_digest(tokenizer),
        max_tokens or "all",
        *prefix,
    )
    path = cache_root(cache_dir) / "tokens" / f"{domain}-{split}-{key}"

    def build(folder: Path) -> None:
        header = write_tokens(
            folder / "tokens.bin", source.read(domain, split), tokenizer, max_tokens, prefix
        )
        if header["count"] <= len(prefix):
            raise DataError(f"the {split} split of domain '{domain}' holds no text to tokenise")
        header |= {"domain": domain, "split": split, "version": VERSION}
        (folder / "header.json").write_text(json.dumps(header, indent=1), encoding="utf-8")

    folder = build_once(path, build, lambda folder: _header(folder) is not None)
    header = _header(folder)
    if header is None:
        raise DataError(f"the token cache {folder} is damaged; delete it and run again")
    tokens = np.memmap(
        folder / "tokens.bin", dtype=header["dtype"], mode="r", shape=(header["count"],)
    )
    return tokens.view(np.ndarray)  # still mapped; slices are cheaper than the subclass's


def write_tokens(
    path: Path,
    chunks: Iterable[str],
    tokenizer: Any,
    max_tokens: int | None = None,
    prefix: Sequence[int] = (),
) -> dict[str, Any]:
    """Writes prefix and token ids of the text at `path`; {count, dtype, vocab_size, sha256}."""
    vocab_size = vocabulary_size(tokenizer)
    # two bytes are enough for GPT-2's 50257 ids
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for ids in chain([np.asarray(prefix, dtype=np.int64)], token_ids(chunks, tokenizer)):
            if max_tokens is not None:
                ids = ids[: max_tokens - count]
            data = ids.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            count += len(ids)
            if max_tokens is not None and count >= max_tokens:
                break
    return {
        "count": count,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "sha256": digest.hexdigest(),
    }


def lines(chunks: Iterable[str], limit: int = LINE) -> Iterator[str]:
    """The lines of a chunked text, each with its newline (the last may lack it), cut every `limit`
    characters."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        for line in whole:
            yield from _cut(line + "\n", limit)
        if len(rest) >= limit:
            *pieces, rest = (
                [*_cut(rest, limit), ""] if len(rest) % limit == 0 else _cut(rest, limit)
            )
            yield from pieces
    if rest:
        yield rest


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id the tokeniser can produce."""
    # len() counts entries, and ids may have gaps
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of everything in the tokeniser that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a Python tokeniser: its class, vocabulary and settings
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer)]
    else:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # set and reset by every call
        state.pop("padding", None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class Blocks(Sequence[np.ndarray]):
    """Rows of `seq_len` tokens, (seq_len,) int64 each; see `blocks`."""

    def __init__(
        self, tokens: np.ndarray, seq_len: int, num_rows: int, prefix: Sequence[int] = ()
    ) -> None:
        self.tokens, self.seq_len, self.num_rows = tokens, seq_len, num_rows
        self.prefix = np.asarray(prefix, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.num_rows))]
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        step = self.seq_len - len(self.prefix)
        start = index % self.num_rows * step
        # int64, which cross_entropy wants of targets
        tokens = self.tokens[start : start + step].astype(np.int64)
        return np.concatenate([self.prefix, tokens]) if len(self.prefix) else tokens


def blocks(
    tokens: np.ndarray, seq_len: int, keep_partial: bool, prefix: Sequence[int] = ()
) -> Blocks:
    """Cuts tokens (T,) into consecutive rows of `seq_len`, each behind `prefix`, which counts.

    Training drops the shorter last row; evaluation keeps it (`keep_partial`) if it has the 2 tokens
    a prediction needs.
    """
    full, rest = divmod(len(tokens), seq_len - len(prefix))
    partial = keep_partial and rest >= 1 and rest + len(prefix) >= 2
    return Blocks(tokens, seq_len, full + (1 if partial else 0), prefix)


def _cut(text: str, limit: int) -> Iterator[str]:
    return (text[i : i + limit] for i in range(0, len(text), limit))


def _header(folder: Path) -> dict[str, Any] | None:
    """The header of a complete cache folder; None if it is missing, unreadable or does not fit its
    tokens."""
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        size = (folder / "tokens.bin").stat().st_size
        return header if size == header["count"] * np.dtype(header["dtype"]).itemsize else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

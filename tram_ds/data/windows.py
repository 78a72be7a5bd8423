"""The tokens a tokeniser gives a whole document, in memory that does not grow with it.

A document is tokenised in windows that overlap. Two neighbours are joined inside their overlap,
where both found the same tokens at the same characters for a run of RUN tokens to either side: what
a window's edge does to its tokens (SentencePiece's prefix, a word cut in two) is behind them there.
Where no such place is found (one word longer than the overlap), both are tokenised as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from tram_ds.runtime.errors import DataError

WINDOW = 1 << 16  # characters
OVERLAP = 1 << 12  # characters
RUN = 16  # tokens
KINDS = 3  # different characters a run has at least: inside one repeated one, nothing is behind
AT_ONCE = 8  # windows tokenised per call, in the tokeniser's own threads
LONGEST = 1 << 22  # characters of a window that could not be joined


@dataclass
class Window:
    """Tokenised text from character `start` of the document on; tokens before `first` are the
    window's before it."""

    start: int
    text: str
    encoding: Any
    first: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def span(self, token: int) -> tuple[int, int]:
        """The characters of the document a token stands for."""
        low, high = self.encoding.token_to_chars(token)
        return self.start + low, self.start + high

    def token_at(self, place: int) -> int | None:
        """The first token at or after a character of the document."""
        for character in range(place - self.start, len(self.text)):
            if (token := self.encoding.char_to_token(character)) is not None:
                return token
        return None


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a document, and where tokenising can go on so that they come again: at
    character `start`, in a window whose tokens before `first` came before."""

    ids: np.ndarray
    start: int = 0
    first: int = 0


def token_ids(
    chunks: Iterable[str], tokenizer: Any, window: int = WINDOW, overlap: int = OVERLAP
) -> Iterator[np.ndarray]:
    """The int64 ids of the document, without special tokens, piece by piece.

    A tokeniser without offsets (pure Python, no tokenizer.json) gets the document as a whole.
    DataError where no place to join is found within LONGEST characters.
    """
    if getattr(tokenizer, "is_fast", False):
        yield from (piece.ids for piece in pieces(chunks, tokenizer, None, window, overlap))
    elif text := "".join(chunks):
        yield np.asarray(_encode(tokenizer, [text])["input_ids"][0], dtype=np.int64)


def pieces(
    chunks: Iterable[str],
    tokenizer: Any,
    after: Piece | None = None,
    window: int = WINDOW,
    overlap: int = OVERLAP,
) -> Iterator[Piece]:
    """The same of a tokeniser with offsets, with their places. after: the piece to begin with once
    more, whose first character `chunks` begin with."""
    last: Window | None = None
    begin = Piece(np.empty(0)) if after is None else after
    windows = _cut(chunks, begin.start, window, overlap)
    while some := list(islice(windows, AT_ONCE)):
        encodings = _encode(tokenizer, [text for _, text in some]).encodings
        for (start, text), encoding in zip(some, encodings, strict=True):
            new = Window(start, text, encoding)
            if last is None:
                new.first = begin.first
                last = new
            elif (join := _join(last, new)) is not None:
                yield _piece(last, join[0])
                new.first = join[1]
                last = new
            else:
                last = _one(last, new, tokenizer)
    if last is not None:
        yield _piece(last, len(last.encoding.ids))


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)


def _piece(window: Window, end: int) -> Piece:
    ids = np.asarray(window.encoding.ids[window.first : end], dtype=np.int64)
    return Piece(ids, window.start, window.first)


def _cut(chunks: Iterable[str], start: int, window: int, overlap: int) -> Iterator[tuple[int, str]]:
    """(start, text) of windows that overlap, the first of them from character `start` on, where
    `chunks` begin; the last is shorter, and never all overlap."""
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > window:
            yield start, held[:window]
            held = held[window - overlap :]
            start += window - overlap
    if held:
        yield start, held


def _join(last: Window, new: Window) -> tuple[int, int] | None:
    """(token of `last`, token of `new`) that are one and the same, RUN tokens before and after them
    too; None if there are none."""
    width = last.end - new.start
    # from the middle of the overlap on: far from the edges of both windows
    left = last.token_at(new.start + width // 2)
    while left is not None and left + RUN <= len(last.encoding.ids):
        place = last.span(left)[0]
        if place >= last.end - width // 8:  # too near to where `last` was cut
            return None
        right = new.token_at(place)
        if right is not None and _same(last, left, new, right):
            return left, right
        left += RUN // 2
    return None


def _same(last: Window, left: int, new: Window, right: int) -> bool:
    if min(left, right) < RUN or right + RUN > len(new.encoding.ids):
        return False
    if any(last.span(left + k) != new.span(right + k) for k in range(-RUN, RUN)):
        return False
    ids, others = last.encoding.ids, new.encoding.ids
    if ids[left - RUN : left + RUN] != others[right - RUN : right + RUN]:
        return False
    low, high = last.span(left - RUN)[0], last.span(left + RUN - 1)[1]
    return len(set(last.text[low - last.start : high - last.start])) >= KINDS


def _one(last: Window, new: Window, tokenizer: Any) -> Window:
    """Both windows tokenised as one."""
    text = last.text + new.text[last.end - new.start :]
    encoding = _encode(tokenizer, [text]).encodings[0]
    one = Window(last.start, text, encoding, last.first)
    # tokens before `first` are given out: the longer text must begin with the same ones
    kept = slice(max(0, last.first - RUN), last.first + RUN)
    if len(text) > LONGEST or encoding.ids[kept] != last.encoding.ids[kept]:
        raise DataError(
            f"{len(text)} characters from character {last.start} of the text on "
            f"({text[:20]!r}...) have no place where the tokeniser can be stopped and started "
            "again: break this word into several"
        )
    return one

"""Tokenised conversations on disk, built once: ids and answers of each, cut to a length, and what
was lost by it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.data.chat import Chat, Unmarkable
from tram_ds.data.conversations import conversations
from tram_ds.data.own_text import OwnText
from tram_ds.data.tokenize import tokenizer_digest
from tram_ds.data.usable import NAMED
from tram_ds.runtime.errors import DataError

VERSION = 3  # raise it when the rules change: it is part of the cache key
HEADER = "header.json"

Example = tuple[np.ndarray, np.ndarray]  # (T,) int64 ids, (T,) bool which are answers


@dataclass
class Cut:
    """What became of the rows of a split: kept, of these shortened, and left out with the first
    named."""

    rows: int = 0
    truncated: int = 0
    left_out: int = 0
    first: dict[str, str] = field(default_factory=dict)  # line -> why

    def leave(self, line: str, why: str) -> None:
        self.left_out += 1
        if len(self.first) < NAMED:
            self.first[line] = why


class Examples(Sequence[Example]):
    """The conversations of a split, read when asked for. cut: what was lost, in which rows."""

    def __init__(self, folder: Path) -> None:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        self.cut = Cut(**header)
        self.ends = np.fromfile(folder / "ends.bin", dtype=np.int64)
        self.ids = np.memmap(folder / "ids.bin", dtype=np.uint32, mode="r")
        self.answers = np.memmap(folder / "answers.bin", dtype=bool, mode="r")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        span = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return self.ids[span].astype(np.int64), np.array(self.answers[span])


def open_examples(
    source: OwnText,
    domain: str,
    split: str,
    chat: Chat,
    seq_len: int,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Examples:
    """The split's conversations, each cut to its first `seq_len` tokens. DataError if no answer is
    left in any."""
    key = digest_of(
        VERSION,
        source.digest(domain, split),
        tokenizer_digest(chat.tokenizer),
        # transformers hands these to the template (bos_token, ...); the backend's digest lacks them
        json.dumps(chat.tokenizer.special_tokens_map, sort_keys=True, default=str),
        chat.template,
        seq_len,
    )
    path = cache_root(cache_dir) / "examples" / f"{domain}-{split}-{key}"

    def build(folder: Path) -> None:
        cut = write_examples(folder, source, domain, split, chat, seq_len)
        places = source.places(list(cut.first))
        if not cut.rows:
            named = "; ".join(f"{places[line]}: {why}" for line, why in cut.first.items())
            raise DataError(
                f"none of the {cut.left_out} {split} rows of domain '{domain}' can be used: {named}"
            )
        cut.first = {places[line]: why for line, why in cut.first.items()}
        # last: by its header a folder is known to be whole
        (folder / HEADER).write_text(json.dumps(vars(cut)), encoding="utf-8")

    return Examples(build_once(path, build, lambda folder: (folder / HEADER).is_file()))


def write_examples(
    folder: Path, source: OwnText, domain: str, split: str, chat: Chat, seq_len: int
) -> Cut:
    """Writes ids, answers and where each row ends."""
    cut, end = Cut(), 0
    with (
        (folder / "ids.bin").open("wb") as ids_file,
        (folder / "answers.bin").open("wb") as answers_file,
        (folder / "ends.bin").open("wb") as ends_file,
    ):
        for line, messages in conversations(source, domain, split):
            try:
                ids, answers = chat.tokens(messages)
            except Unmarkable as error:
                cut.leave(line, str(error))
                continue
            if not answers[1:seq_len].any():  # nothing stands before the first
                cut.leave(line, f"no token of an answer within task.seq_len {seq_len}")
                continue
            cut.rows += 1
            cut.truncated += len(ids) > seq_len
            end += min(len(ids), seq_len)
            ids_file.write(ids[:seq_len].astype(np.uint32).tobytes())
            answers_file.write(answers[:seq_len].tobytes())
            ends_file.write(np.int64(end).tobytes())
    return cut

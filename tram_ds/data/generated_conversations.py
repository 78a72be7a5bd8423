"""Tiny made-up conversations for smoke runs and tests: always the same, needs nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tram_ds.data.cache import build_once, cache_root

VERSION = 1  # raise it when the data changes: it is part of the cache key
ROWS = 120  # of each domain
WORDS = ("river", "stone", "lamp", "garden", "window", "paper", "winter")


def conversations_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`reversals.jsonl` and `sums.jsonl`, with a column `messages`; some have two answers."""

    def build(folder: Path) -> None:
        for name, turn in (("reversals", _reversal), ("sums", _sum)):
            rows = [_row(turn, number) for number in range(ROWS)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    path = cache_root(cache_dir) / "generated" / f"conversations-{VERSION}"
    return build_once(path, build, lambda folder: folder.is_dir())


def _row(turn: Any, number: int) -> dict[str, Any]:
    turns = [turn(number), *([turn(number + ROWS)] if number % 3 == 0 else [])]
    pairs = (zip(("user", "assistant"), pair, strict=True) for pair in turns)
    messages = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    return {"messages": messages}


def _sum(number: int) -> tuple[str, str]:
    left, right = number * 7 % 50, number * 11 % 30
    return f"What is {left} plus {right}?", f"It is {left + right}."


def _reversal(number: int) -> tuple[str, str]:
    word = WORDS[number % len(WORDS)] + str(number)
    return f"Write {word} backwards.", word[::-1]

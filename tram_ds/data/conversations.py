"""Rows of conversations: `messages`, or `prompt` and `completion`; one line of JSON each, so that a
source of text carries them (tram_ds.data.own_text)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tram_ds.data.rows import LONGEST, Row
from tram_ds.data.sources import Source
from tram_ds.data.tokenize import lines
from tram_ds.runtime.wording import short

ANSWERS = "assistant"  # the role whose turns are learned
Messages = list[dict[str, str]]
# columns that belong to what is said where they are there, and have no place in a conversation here
BESIDE = (
    "system",
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
    "image",
    "images",
    "audio",
    "audios",
    "video",
    "videos",
)
EMPTY = (None, "", [], {})  # 0 and False say something: `weight: 0` is a turn not to be learned


def conversation(row: Row, column: str) -> tuple[str, str]:
    """(the row's conversation as a line of JSON, nothing), or (nothing, why it has none). column:
    of rows of text, not read."""
    if more := [key for key in BESIDE if row.values.get(key) not in EMPTY]:
        return "", f"{more[0]} beside its messages, which would not be read"
    messages = _messages(row)
    if wrong := messages if isinstance(messages, str) else _wrong(messages):
        return "", wrong
    # one line, whatever is said: JSON escapes the newlines in it
    return json.dumps(messages, ensure_ascii=False), ""


def conversations(source: Source, domain: str, split: str) -> Iterator[tuple[str, Messages]]:
    """(line, messages) of a split whose lines `conversation` wrote."""
    # by default lines() cuts at a mebibyte, and half a conversation is no JSON
    for line in lines(source.read(domain, split), limit=LONGEST):
        yield line, json.loads(line)


class Contents:
    """Implements Source: what is said in the conversations of another, without their JSON."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def domains(self) -> list[str]:
        return self.source.domains()

    def splits(self, domain: str) -> list[str]:
        return self.source.splits(domain)

    def read(self, domain: str, split: str) -> Iterator[str]:
        for _, messages in conversations(self.source, domain, split):
            yield from (f"{message['content']}\n" for message in messages)

    def digest(self, domain: str, split: str) -> str:
        return self.source.digest(domain, split)


def _messages(row: Row) -> Any:
    """The row's messages as they are there, or why there are none."""
    values = row.values
    if values.get("messages") is not None:
        return (
            values["messages"]
            if isinstance(values["messages"], list)
            else (f"messages is {short(values['messages'], 20)}, not a list")
        )
    both = [values.get(key) for key in ("prompt", "completion")]
    if both == [None, None]:
        return "no messages, nor prompt and completion"
    for key, value in zip(("prompt", "completion"), both, strict=True):
        if not isinstance(value, str):
            return f"no {key}" if value is None else f"{key} is {short(value, 20)}, not text"
    roles = ("user", ANSWERS)
    return [{"role": role, "content": text} for role, text in zip(roles, both, strict=True)]


def _wrong(messages: list[Any]) -> str:
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} has no role"
        if not isinstance(message.get("content"), str):
            return f"message {number} has no text as its content"
        more = [k for k, value in message.items() if value not in EMPTY]
        if more := [key for key in more if key not in ("role", "content")]:
            return f"message {number} has {more[0]} beside role and content"
    if not any(m["role"] == ANSWERS and m["content"].strip() for m in messages):
        return f"no turn of the {ANSWERS} that says anything"
    return ""

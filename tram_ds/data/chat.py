"""A conversation as tokens, and which of them are the assistant's: what a chat template makes of
it.

The answers are found by what the template itself says: its `generation` blocks where it has them;
else the text up to an answer, as it is when the answer is asked for, must be how the whole begins.
A conversation whose template says neither is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tram_ds.data.conversations import ANSWERS, Messages
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import short

BLOCKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
DAY = "26 Jul 2024"  # Llama's own: where a template writes the date, tokens are every day's
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


PLACEHOLDER = "0answer0"  # no template has it, nor trims, escapes or splits it
CLOCK = "strftime_now"  # what templates ask for the date


class Unmarkable(Exception):
    """A conversation whose answers cannot be told from the rest, and why."""


@dataclass(frozen=True)
class Chat:
    """A fast tokeniser and the template that it is used with."""

    tokenizer: Any
    template: str

    def __post_init__(self) -> None:
        """DataError for a template that writes the date and takes none."""
        if CLOCK in self.template and "date_string" not in self.template:
            raise DataError(
                "the chat template writes the date of the day, so the tokens would be others "
                "tomorrow: set task.chat_template to one without strftime_now"
            )

    def tokens(self, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
        """((T,) int64 ids, (T,) bool which are answers, with the token that ends each). Unmarkable
        if that cannot be told."""
        text = self._rendered(messages)
        blocks = bool(BLOCKS.search(self.template))
        spans = self._blocks(messages) if blocks else self._spans(messages, text)
        # no special tokens: the template has written them into the text itself
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
        answers = np.zeros(len(encoding.ids), dtype=bool)
        starts, ends = _extents(encoding.offsets)
        for start, end in spans:
            # a block may begin within a token; of a header found by its text the token is a part
            inside = (ends > start) if blocks else (starts >= start) & (ends > start)
            answers |= inside & (starts < end)
        return np.asarray(encoding.ids, dtype=np.int64), answers

    def asked(self, text: str) -> list[int]:
        """The ids up to where the answer to a user's words begins. Unmarkable as tokens."""
        rendered = self._rendered([{"role": "user", "content": text}], add_generation_prompt=True)
        return self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]

    def ends(self) -> set[int]:
        """The special token that ends an answer, where the template writes one."""
        talk = [{"role": "user", "content": "a"}, {"role": ANSWERS, "content": "a"}]
        try:
            ids, answers = self.tokens(talk)
        except Unmarkable:
            return set()
        last = int(ids[answers][-1]) if answers.any() else -1
        found = self.tokenizer.added_tokens_decoder.get(last)
        return {last} if found is not None and found.special else set()

    def _blocks(self, messages: Messages) -> list[tuple[int, int]]:
        """Characters of the template's `generation` blocks: (first, end) of each."""
        # not its mask of tokens, which from a space that the tokeniser trims, or a character of
        # several tokens, at the edge of a block on has too few or all of them
        try:
            # (texts, spans) of several conversations, whatever its annotation says
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self._day()},
            )
        except TemplateError as error:
            raise _refused(error) from error
        return rendered[1][0]

    def _spans(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Characters of the answers in the whole text: (first, end) of each."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ANSWERS or not message["content"].strip():
                continue
            # with what asks for an answer: a header is the question's part, and is not learned
            before = self._rendered(messages[:number], add_generation_prompt=True)
            after = self._rendered(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise Unmarkable(
                    f"the chat template writes message {number + 1} otherwise when it is asked for "
                    "or when others follow: mark answers with {% generation %} in a "
                    "task.chat_template"
                )
            added, content = after[len(before) :], message["content"].strip()
            place = added.find(content)
            if place < 0:
                raise Unmarkable(f"the chat template changes the text of message {number + 1}")
            # a header that is not asked for apart, or the end of a turn, may hold the words too
            if place != added.rfind(content):
                place = self._behind_header(messages[:number], message, before, added)
            first, end = _answer(added, place, content)
            spans.append((len(before) + first, len(before) + end))
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
        return spans

    def _behind_header(self, told: Messages, answer: Any, before: str, added: str) -> int:
        """Where in `added`, what the template adds for an answer, its words begin: behind what it
        writes in front of any other answer too."""
        other = self._rendered([*told, {**answer, "content": PLACEHOLDER}])
        header, found, _ = other.removeprefix(before).partition(PLACEHOLDER)
        rest = added.removeprefix(header)
        # a template may keep the spaces around an answer
        place = len(added) - len(rest.lstrip())
        if not (found and added.startswith(header)) or not added.startswith(
            answer["content"].strip(), place
        ):
            raise Unmarkable(
                f"the words of message {len(told) + 1} stand more than once in what the chat "
                "template makes of it: mark answers with {% generation %} in a task.chat_template"
            )
        return place

    def _rendered(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._applied(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _applied(self, messages: Messages, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, **self._day(), **how
            )
        except TemplateError as error:
            raise _refused(error) from error

    def _day(self) -> dict[str, str]:
        return {"date_string": DAY} if CLOCK in self.template else {}


def _refused(error: TemplateError) -> Unmarkable:
    return Unmarkable(f"the chat template refuses it: {short(str(error))}")


def _extents(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(where each token's characters begin, where they end): of a token that was trimmed to
    nothing, a space, behind those of the one before."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], ends[:-1]])
    return np.where(starts == ends, before, starts), ends


def _answer(text: str, place: int, content: str) -> tuple[int, int]:
    """Where in what the template adds for an answer, whose words are at `place`, it begins and
    ends: without what stands before it, with what ends it, without empty space behind that."""
    behind = text[place + len(content) :]
    ended = behind.rstrip() or behind
    return (place if text[:place].strip() else 0), place + len(content) + len(ended)

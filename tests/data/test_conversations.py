"""Rows as conversations, and their tokens on disk: what is kept, cut and left out, by its place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.data.test_chat import LLAMA3, MISTRAL, TALK, tokenizer
from tests.data.test_rows import write
from tram_ds.data.chat import CHATML, Chat
from tram_ds.data.choose import open_conversations
from tram_ds.data.conversations import Contents, conversation, conversations
from tram_ds.data.examples import open_examples
from tram_ds.data.rows import Row
from tram_ds.data.usable import Reading
from tram_ds.runtime.errors import DataError

tokenizer = tokenizer  # the fixture
TRAIN_ONLY = Reading(held_out=1e-9)


def source_of(path, reading=TRAIN_ONLY):
    return open_conversations(str(path), path.parent / "cache", reading=reading)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_messages_and_pairs_are_read_from_every_kind(tmp_path, ending):
    write(tmp_path / f"a{ending}", [TALK, TALK[:2]], "messages")
    found = conversations(source_of(tmp_path / f"a{ending}"), "a", "train")
    assert [messages for _, messages in found] == [TALK, TALK[:2]]
    path = write(tmp_path / "b.csv", ["2+2?"], "prompt", completion=["Four."])
    assert [m for _, m in conversations(source_of(path), "b", "train")] == [TALK[:2]]
    contents = "".join(Contents(source_of(path)).read("b", "train"))
    assert contents == "2+2?\nFour.\n"


@pytest.mark.parametrize(
    "values, why",
    [
        ({"text": "x"}, "no messages, nor prompt and completion"),
        ({"messages": "x"}, "messages is 'x', not a list"),
        ({"messages": ["x"]}, "message 1 has no role"),
        ({"messages": [TALK[0], {"role": "assistant", "content": 3}]}, "message 2 has no text"),
        ({"messages": [{**TALK[1], "tool_calls": [1]}]}, "message 1 has tool_calls beside role"),
        ({"messages": [{**TALK[1], "weight": 0}]}, "message 1 has weight beside role"),
        ({"messages": [{**TALK[1], "trained": False}]}, "message 1 has trained beside role"),
        ({"messages": TALK, "tools": [{"name": "f"}]}, "tools beside its messages, which would"),
        ({"prompt": "x", "completion": "y", "system": "z"}, "system beside its messages"),
        ({"messages": TALK, "images": ["a.png"], "tools": []}, "images beside its messages"),
        ({"messages": TALK[:1]}, "no turn of the assistant"),
        ({"messages": []}, "no turn of the assistant"),
        ({"prompt": "x", "completion": " "}, "no turn of the assistant"),
        ({"prompt": "x"}, "no completion"),
        ({"prompt": 1, "completion": "x"}, "prompt is 1, not text"),
    ],
)
def test_a_row_that_is_no_conversation_says_why(values, why):
    text, wrong = conversation(Row("line 1", values), "text")
    assert not text and why in wrong


def test_what_is_empty_says_nothing():
    empty = {"tools": None, "images": [], "system": "", "id": 7, "source": "a"}
    messages = [TALK[0] | {"name": None}, TALK[1] | {"tool_calls": []}]
    text, wrong = conversation(Row("line 1", {"messages": messages, **empty}), "text")
    assert json.loads(text) == messages and not wrong


def test_rows_are_cut_counted_and_named_by_their_line(tmp_path, tokenizer):
    """In ChatML with a token a byte a question of n characters is n + 8 tokens with its markers,
    and the answer's own begin 11 after it."""
    rows = [
        {"messages": TALK[:2]},  # 12 + 11 + 6 + 1 = 30 tokens
        {"prompt": "x" * 90, "completion": "never reached"},
        {"prompt": "xx", "completion": "y" * 50},  # its answer begins at 10 + 11 = 21
        {"messages": TALK[:1]},
        {"prompt": "x" * 11, "completion": "z"},  # at 19 + 11 = 30: the first that is cut off
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + "\n".join(json.dumps(row) for row in rows))
    source = source_of(path)
    chat = Chat(tokenizer, CHATML)
    examples = open_examples(source, "a", "train", chat, 30, tmp_path / "cache")
    assert source.said()["left_out"] == (
        "1 row: a.jsonl line 5: no turn of the assistant that says anything"
    )
    cut = examples.cut
    assert (cut.rows, cut.truncated, cut.left_out) == (2, 1, 2)
    why = "no token of an answer within task.seq_len 30"
    assert cut.first == {"a.jsonl line 3": why, "a.jsonl line 6": why}
    assert [(len(ids), int(answers.sum())) for ids, answers in examples] == [(30, 6), (30, 9)]
    whole, _ = chat.tokens(TALK[:2])
    np.testing.assert_array_equal(examples[0][0], whole)
    np.testing.assert_array_equal(np.flatnonzero(examples[1][1]), np.arange(21, 30))
    with pytest.raises(IndexError):
        examples[2]
    again = open_examples(source, "a", "train", chat, 30, tmp_path / "cache")
    assert again.cut == cut and len(again) == 2


def test_rows_of_which_none_is_left_are_refused_with_their_places(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [[{"role": "system", "content": "x"}, *TALK]], "messages")
    with pytest.raises(DataError, match=r"none of the 1 train rows .*a\.jsonl line 1: .*no system"):
        open_examples(source_of(path), "a", "train", Chat(tokenizer, MISTRAL), 99, tmp_path / "c")
    path.write_text('{"conversations": []}\n')
    with pytest.raises(
        DataError, match=r"a\.jsonl line 1: no messages, nor prompt .*columns are conversations"
    ):
        source_of(path)


def test_data_that_is_not_there_says_what_could_be():
    with pytest.raises(
        DataError, match=r"'no-such' is neither .*messages, or prompt and completion"
    ):
        open_conversations("no-such")


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama", "mistral"])
def test_an_instruction_set_of_real_text_counts_its_completions(tmp_path, template):
    """With GPT-2's own tokenizer, whose markers are ordinary text: what is counted reads as the
    completions do, and the rest as the whole text without them."""
    data = Path(os.environ.get("TRAM_DS_DATA", "none"))
    if not (data / "gpt2_bpe").is_dir() or not (data / "edu_domains").is_dir():
        pytest.skip("TRAM_DS_DATA does not point at a folder with gpt2_bpe and edu_domains")
    gpt2 = AutoTokenizer.from_pretrained(data / "gpt2_bpe")
    lines = (data / "edu_domains/art/train.txt").read_text().splitlines()
    pairs = [line.split(". ", 1) for line in lines if ". " in line and len(line) < 600][:200]
    asked, answered = ([pair[i].strip() for pair in pairs] for i in (0, 1))
    path = write(tmp_path / "art.jsonl.gz", asked, "prompt", completion=answered)
    chat = Chat(gpt2, template)
    examples = open_examples(source_of(path), "art", "train", chat, 1024, tmp_path / "cache")
    assert len(examples) == len(pairs) == 200 and not examples.cut.left_out
    for (ids, answers), completion in zip(examples, answered, strict=True):
        counted = gpt2.decode(ids[answers]).lstrip()
        assert counted.startswith(completion)
        assert counted.removeprefix(completion) in ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")
        assert completion not in gpt2.decode(ids[~answers])

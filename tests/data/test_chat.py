"""Which tokens are the assistant's, in templates of three kinds, counted by hand: every byte is a
token and every marker is one."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import processors

from tests.data.test_windows import llama
from tram_ds.data.bpe import train_tokenizer
from tram_ds.data.chat import CHATML, Chat, Unmarkable
from tram_ds.runtime.errors import DataError

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% else %}{{ raise_exception('no ' + m['role']) }}"
    "{% endif %}{% endfor %}"
)
BLOCKS = (  # ChatML that says itself what is an answer
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "é?"},
    {"role": "assistant", "content": "é is 2"},
]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["no merges"], 257)
    made.add_special_tokens({"additional_special_tokens": MARKERS})
    return made


def said(tokenizer, template, messages):
    """(all the text, what is counted of it, how many tokens each)."""
    ids, answers = Chat(tokenizer, template).tokens(messages)
    assert ids.dtype == np.int64 and answers.dtype == bool and len(ids) == len(answers)
    return tokenizer.decode(ids), tokenizer.decode(ids[answers]), (len(ids), int(answers.sum()))


@pytest.mark.parametrize(
    "template, text, counted, numbers",
    [
        # a turn: <|im_start|>, role, newline, content, <|im_end|>, newline
        # 4 x 4 for the markers and newlines, 4 + 9 + 4 + 9 roles, 4 + 5 + 3 + 7 contents
        (
            CHATML,
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
            "<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\né is 2<|im_end|>\n",
            "Four.<|im_end|>é is 2<|im_end|>",
            (16 + 26 + 19, 6 + 8),
        ),
        # begin, and a turn: two headers, role, two newlines, content, <|eot_id|>
        (
            LLAMA3,
            "<|endoftext|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\né?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\né is 2<|eot_id|>",
            "Four.<|eot_id|>é is 2<|eot_id|>",
            (1 + 20 + 26 + 19, 6 + 8),
        ),
        # begin, `[INST] ` (7) and ` [/INST]` (8) around a question, a space before an answer
        (
            MISTRAL,
            "<|endoftext|>[INST] 2+2? [/INST] Four.<|endoftext|>[INST] é? [/INST] é is 2"
            "<|endoftext|>",
            " Four.<|endoftext|> é is 2<|endoftext|>",
            (1 + 15 + 4 + 7 + 15 + 3 + 9, 7 + 9),
        ),
    ],
    ids=["chatml", "llama", "mistral"],
)
def test_answers_are_counted_with_what_ends_them(tokenizer, template, text, counted, numbers):
    assert said(tokenizer, template, TALK) == (text, counted, numbers)


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama"])
def test_a_system_turn_and_a_question_at_the_end_are_not_counted(tokenizer, template):
    messages = [{"role": "system", "content": "Be brief."}, *TALK, TALK[0]]
    assert said(tokenizer, template, messages)[1] == said(tokenizer, template, TALK)[1]


def test_blocks_of_the_template_say_the_same(tokenizer):
    assert said(tokenizer, BLOCKS, TALK) == said(tokenizer, CHATML, TALK)


def test_a_tokenizer_with_a_prefix_counts_the_same_text():
    ids, answers = Chat(
        llama(), MISTRAL.replace("bos_token", "''").replace("eos_token", "'!'")
    ).tokens(TALK)
    assert str(llama().decode(ids[answers])).replace(" ", "") == "Four.!éis2!"


def test_an_answer_that_an_empty_line_alone_ends_keeps_it(tokenizer):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    text, counted, _ = said(tokenizer, template, TALK)
    assert counted == "Four.\n\né is 2\n\n" and text.startswith("user: 2+2?\n\nassistant: Four.")


@pytest.mark.parametrize("answer", ["a", "is", "assistant", ": ", "aa", "end", "im_end", "s\n"])
def test_words_of_the_header_or_of_the_end_are_not_taken_for_the_answer(tokenizer, answer):
    """The first template writes its header without being asked; ": " is none without its spaces."""
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    talk = [TALK[0], {"role": "assistant", "content": answer}]
    assert said(tokenizer, plain, talk)[1].strip() == answer.strip()
    assert said(tokenizer, CHATML, talk)[1] == f"{answer}<|im_end|>"


def test_words_whose_place_the_header_does_not_tell_are_refused(tokenizer):
    """A header that counts the letters of the answer is another for another answer."""
    counting = CHATML.replace(
        "message['content'] +", "message['content'] | length ~ ' ' ~ message['content'] +"
    )
    assert said(tokenizer, counting, TALK[:2])[1] == "Four.<|im_end|>"
    with pytest.raises(Unmarkable, match=r"message 2 stand more than once .* generation"):
        Chat(tokenizer, counting).tokens([TALK[0], {"role": "assistant", "content": "1"}])


def test_the_date_is_the_same_on_every_day(tokenizer):
    today = "{{ strftime_now('%d %b %Y') }}" + CHATML
    given = "{% if date_string is not defined %}" + today + "{% endif %}{{ date_string }}" + CHATML
    assert said(tokenizer, given, TALK)[0].startswith("26 Jul 2024<|im_start|>")
    with pytest.raises(DataError, match=r"writes the date .* set task\.chat_template"):
        Chat(tokenizer, today)


@pytest.mark.parametrize(
    "template, messages, why",
    [
        (MISTRAL, [{"role": "system", "content": "x"}, *TALK], "refuses it: 'no system'"),
        (
            CHATML.replace("message['content']", "message['content'] | upper"),
            TALK,
            "changes the text",
        ),
        (
            CHATML.replace("{{ '<|im_start|>'", "{{ ('' if loop.last else '.') + '<|im_start|>'"),
            TALK,
            "writes message 2 otherwise .* generation",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(tokenizer, template, messages, why):
    with pytest.raises(Unmarkable, match=why):
        Chat(tokenizer, template).tokens(messages)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("words", [(" yes", "no"), ("yes ", " no"), ("yes é", "no é")])
def test_a_block_is_learned_to_its_last_token_and_no_further(
    trim: bool, words: tuple[str, str]
) -> None:
    """Spaces at its edges, which Llama 3's tokeniser has no characters for, and a character of two
    tokens."""
    made = train_tokenizer(["no merges"], 257)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %};{% endfor %}"
    )
    talk = [
        {"role": role, "content": content}
        for word in words
        for role, content in (("user", "é?"), ("assistant", word))
    ]
    text, learned, (_, count) = said(made, template, talk)
    assert text == f"user:é?;assistant:{words[0]};user:é?;assistant:{words[1]};"
    assert learned == "".join(words) and count == len("".join(words).encode())

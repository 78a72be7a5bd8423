"""Samples are what transformers generates from the same weights, whatever stands beside a prompt;
and a prompt that leaves no room is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.made_recipes import MINIMAL
from tram_ds.evaluation import samples
from tram_ds.recipe.file import RecipeError
from tram_ds.tracking.results import samples_text

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=23, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    config.initializer_range = 0.5  # so that the texts are not one token over and over
    return GPT2LMHeadModel(config).train()


def by_transformers(model: Any, prompt: list[int], tokens: int, end: int) -> list[int]:
    model.eval()
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    model.train()
    return found[0, len(prompt) :].tolist()


def test_the_ids_are_those_of_transformers_and_the_mode_is_given_back(model) -> None:
    """In batches of two and of one; ended by a token that one of them meets on the way."""
    free = [by_transformers(model, prompt, 8, -1) for prompt in PROMPTS]
    end = free[0][3]
    want = [by_transformers(model, prompt, 8, end) for prompt in PROMPTS]
    assert len(want[0]) <= 4 and any(len(ids) > 4 for ids in want)
    numbers: Any = SimpleNamespace(
        prompt=lambda text: PROMPTS[int(text)],
        ends=lambda: {end},
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids)),
    )
    found = samples.generate(model, numbers, ["0", "1", "2"], 8, 2)
    assert [sample["text"] for sample in found] == [str(ids) for ids in want]
    ended = ["end" if ids[-1] == end else "length" for ids in want]
    assert [sample["ended"] for sample in found] == ended
    assert model.training


def task(positions: int) -> Any:
    config = SimpleNamespace(max_position_embeddings=positions)
    outline = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    return SimpleNamespace(model=lambda _: outline, prompt=lambda text: text.split())


WORDS = "eval.generate={prompts: [a b, a b c d], max_tokens: 6}"


def test_a_prompt_that_leaves_no_room_is_refused_by_its_number(recipe_of) -> None:
    samples.check(recipe_of(MINIMAL), task(1))
    samples.check(recipe_of(MINIMAL, WORDS), task(10))
    with pytest.raises(RecipeError, match=r"eval.generate.max_tokens = 6: with the 4 tokens of pr"):
        samples.check(recipe_of(MINIMAL, WORDS), task(9))
    with pytest.raises(RecipeError, match=r"eval.generate.prompts: prompt 1 is no token"):
        samples.check(recipe_of(MINIMAL, "eval.generate={prompts: [' ']}"), task(100))


def test_samples_as_text() -> None:
    made = [{"prompt": "One\ntwo", "text": " three", "ended": "length"}]
    made.append({"prompt": "A", "text": "b", "ended": "end"})
    assert samples_text({"samples": made}) == "> One\n> two\n\n three ...\n\n> A\n\nb\n"
    assert samples_text({"samples": []}) == samples_text({}) == ""

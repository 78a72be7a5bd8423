"""The instruction task: answers alone are counted, padding changes nothing, and what is lost is
said or refused before any weight."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.data.test_chat import MISTRAL, TALK
from tram_ds.evaluation.score import evaluate
from tram_ds.models.chunked import Chunked
from tram_ds.recipe.loading import load
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.recipe import RecipeError
from tram_ds.recipe.sections import EvalSection, TrainSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.errors import DataError
from tram_ds.tasks.instruction import build

TINY = {
    "architecture": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def recipe_for(tmp_path_factory):
    """Makes a recipe from task keys."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**task):
        keys = {"name": "instruction", "data": "generated", "seq_len": 64, "cache_dir": cache}
        return SimpleNamespace(
            task=TaskSection.model_validate(keys | task),
            model=ModelSection(init=TINY),
            train=TrainSection(steps=1, global_batch=2, micro_batch=1),
            eval=EvalSection(),
        )

    return make


@pytest.fixture(scope="module")
def task(recipe_for):
    return build(recipe_for(train="sums"))


def test_a_fresh_model_speaks_chatml_and_other_files_are_zero_shot(task):
    assert task.train_domains == ["sums"] and task.eval_domains == ["sums", "reversals"]
    ids, answers = task.train_rows()[0]
    text = task.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>user\nWhat is ") and len(task.tokenizer) == 300
    said = task.tokenizer.decode(ids[answers])
    assert said.startswith("It is ") and said.endswith("<|im_end|>")
    assert set(task.said()) == {"rows", "held_out", "truncated"}
    assert list(task.eval_sets("validation")) == ["sums", "reversals"]


def test_a_prompt_is_what_a_user_says_and_ends_where_the_template_ends_an_answer(task):
    asked = task.tokenizer.decode(task.prompt("Why?"))
    assert asked == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    end = task.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert task.ends() == {end, task.tokenizer.eos_token_id}


def test_the_loss_is_that_of_the_answers_alone(task):
    """Against a plain loop over the positions of each row by itself."""
    model = task.model().eval()
    rows = [task.train_rows()[i] for i in (0, 1, 5)]
    expected, counted = 0.0, 0
    for ids, answers in rows:
        log_p = model(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            if answers[position]:
                expected -= float(log_p[position - 1, ids[position]].detach())
                counted += 1
    batch = task.collate(rows)
    before = {key: value.clone() for key, value in batch.items()}
    whole, chunked = task.forward(model, batch), task.chunked(model)
    assert isinstance(chunked, Chunked)
    for output in (whole, chunked(model, batch)):
        assert float(output.loss_sum.detach()) == pytest.approx(expected, rel=1e-5)
        assert int(output.count) == counted == sum(int(row[1][1:].sum()) for row in rows)
    assert task.counts(batch) == (counted, sum(len(row[0]) for row in rows))
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    scores = evaluate(model, task, {"x": rows}, 2)
    assert scores["x"]["loss"] == pytest.approx(expected / counted, rel=1e-5)
    assert scores["x"]["perplexity"] == pytest.approx(np.exp(expected / counted), rel=1e-5)


def test_labels_are_ignored_beside_answers_and_under_padding(task):
    batch = task.collate(
        [
            (np.array([5, 6, 7]), np.array([False, True, True])),
            (np.array([8, 9]), np.array([False, True])),
        ]
    )
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"][:, :2].tolist() == [[5, 6], [8, 9]]
    assert task.counts(batch) == (3, 5)


def test_all_domains_are_read_one_after_the_other(recipe_for):
    both = build(recipe_for(train="all"))
    rows = both.train_rows()
    parts = [both._open(domain, "train") for domain in ("reversals", "sums")]
    assert len(rows) == len(parts[0]) + len(parts[1])
    np.testing.assert_array_equal(rows[len(parts[0])][0], parts[1][0][0])
    np.testing.assert_array_equal(rows[len(rows) - 1][0], parts[1][len(parts[1]) - 1][0])


def test_a_template_of_ones_own_is_used_and_kept_beside_the_model(recipe_for, task, tmp_path):
    (tmp_path / "mine.jinja").write_text(MISTRAL)
    own = build(recipe_for(chat_template=str(tmp_path / "mine.jinja")))
    assert own.tokenizer.decode(own.train_rows()[0][0]).startswith("<|endoftext|>[INST] Write")
    own.tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == MISTRAL
    named = build(recipe_for(tokenizer=str(tmp_path / "saved")))
    np.testing.assert_array_equal(named.train_rows()[3][0], own.train_rows()[3][0])
    plain = tmp_path / "plain"
    task.tokenizer.save_pretrained(plain)
    (plain / "chat_template.jinja").rename(plain / "chat_template.off")
    with pytest.raises(DataError, match=r"plain' has no chat template: set task\.chat_template"):
        build(recipe_for(tokenizer=str(plain)))
    with pytest.raises(DataError, match=r"task\.chat_template /no/such cannot be read"):
        build(recipe_for(chat_template="/no/such"))


def test_what_a_short_seq_len_loses_is_said(recipe_for, tmp_path):
    rows = [{"messages": TALK[:2], "topic": f"t{i % 2}"} for i in range(40)]
    for i, row in enumerate(rows):
        row["messages"] = [{**TALK[0], "content": f"question {i}"}, TALK[1]]
    rows[7]["messages"][0]["content"] = "long " * 80
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    keys = {"data": str(tmp_path / "a.jsonl"), "domain_column": "topic", "train": "t1"}
    task = build(recipe_for(**keys, held_out=0.25))
    assert task.eval_domains == ["t1", "t0"]
    assert task.said()["no_answers"] == (
        "1 row: a.jsonl line 8: no token of an answer within task.seq_len 64"
    )
    with pytest.raises(DataError, match=r"none of the .* train rows .* within task\.seq_len 12"):
        build(recipe_for(**keys, seq_len=12))


@pytest.mark.parametrize(
    "word, why",
    [
        ("task.column=body", "task.name = instruction does not read task.column"),
        ("task.bos=block", "task.name = instruction does not read task.bos"),
        ("algorithm={name: tram_x, distance: mmd}", "mmd compares samples .* = instruction"),
    ],
)
def test_keys_that_instruction_does_not_read_are_refused(word, why):
    with pytest.raises(RecipeError, match=why):
        load("sft_llama", [word])
    with pytest.raises(RecipeError, match=r"does not read task\.chat_template"):
        load("own_text", ["task.chat_template=x"])


PACKABLE = {
    "rotary": TINY,
    "learned positions": {
        "architecture": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 300,
    },
    "windows": TINY | {"architecture": "mistral", "sliding_window": 16},
}


@pytest.mark.parametrize("init", PACKABLE.values(), ids=PACKABLE)
@pytest.mark.parametrize(
    "attention, dtype, near",
    # eager takes its softmax in float32
    [("sdpa", torch.float64, 1e-12), ("eager", torch.float32, 1e-6)],
)
def test_a_pack_is_its_conversations_one_by_one(recipe_for, init, attention, dtype, near):
    """Logits, loss, counts and gradient of two packs against those of their rows in batches."""
    recipe = recipe_for(packing=True, seq_len=128)
    recipe.model = ModelSection(init=init, attention=attention)
    task = build(recipe)
    model = task.model().to(dtype).eval()
    packs = [task.train_rows()[i] for i in (0, len(task.train_rows()) - 1)]
    assert len(packs[0]) > 1 and sum(len(ids) for ids, _ in packs[0]) <= 128
    rows = [row for pack in packs for row in pack]

    def passed(batch):
        model.zero_grad()
        output = task.forward(model, batch)
        output.loss_sum.backward()
        return output, [p.grad for p in model.parameters()]

    (packed, packed_g), (alone, alone_g) = map(passed, map(task.collate, (packs, rows)))
    assert int(packed.count) == int(alone.count) == sum(int(row[1][1:].sum()) for row in rows)
    # the same positions in the same order: row by row of a pack
    torch.testing.assert_close(packed.logits, alone.logits, rtol=0, atol=near)
    torch.testing.assert_close(packed.loss_sum, alone.loss_sum, rtol=1e-6, atol=0)  # in float32
    scale = max(float(g.abs().max()) for g in alone_g)
    torch.testing.assert_close(packed_g, alone_g, rtol=0, atol=1e-6 * scale)
    batch = task.collate(packs)
    assert task.counts(batch) == task.counts(task.collate(rows))
    chunked = task.chunked(model)(model, batch)
    assert float(chunked.loss_sum.detach()) == pytest.approx(float(alone.loss_sum.detach()), 1e-6)
    task.examine(model)


def test_what_a_pack_is_made_of(task):
    """Positions begin anew with every conversation and with the padding; its first token, which
    the one before would predict, is no target."""
    first = (np.array([5, 6, 7]), np.array([True, False, True]))
    second = (np.array([8, 9]), np.array([True, True]))
    batch = task.collate([[first, second], [second]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9], [-100, 9, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert "position_ids" not in task.collate([first, second])


def test_a_model_that_sees_across_a_pack_is_refused(recipe_for, task):
    """Bloom knows where a token is by its distance alone, and takes no positions."""
    recipe = recipe_for(packing=True)
    bloom = {"architecture": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}
    recipe.model = ModelSection(init=bloom | {"vocab_size": 300}, attention="eager")
    packing = build(recipe)
    with pytest.raises(DataError, match=r"packing = true: in a Bloom.* sees those packed before"):
        packing.examine(packing.model().eval())

    class Blind(torch.nn.Module):  # positions go in, and nothing is made of them
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, position_ids, use_cache):
            return self.model(input_ids=input_ids, use_cache=use_cache)

    with pytest.raises(DataError, match="in a Blind a conversation sees"):
        packing.examine(Blind(task.model().eval()))
    task.examine(packing.model())  # not asked for: nothing is looked at

"""task.streaming: what is trained on and scored is what the cached path has, and what would need
all rows to be read first is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tram_ds.data.bpe import train_tokenizer
from tram_ds.data.stream import Stream
from tram_ds.recipe.file import RecipeError
from tram_ds.recipe.loading import load
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.sections import EvalSection, TrainSection
from tram_ds.recipe.task_section import TaskSection
from tram_ds.runtime.errors import DataError
from tram_ds.tasks.language_modeling import build

TEXTS = [f"note {i}: {'seen ' * (i % 5)}here" for i in range(400)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Rows of two domains; a tokenizer."""
    root = tmp_path_factory.mktemp("data")
    for domain, texts in (("art", TEXTS), ("math", TEXTS[::-1])):
        (root / "rows" / domain).mkdir(parents=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / "rows" / domain / "train.jsonl").write_text(lines)
    train_tokenizer(TEXTS, 300).save_pretrained(root / "tokenizer")
    return root


def made(root: Path, cache: Path, **task):
    task = {
        "name": "language_modeling",
        "data": str(root / "rows"),
        "seq_len": 16,
        "max_eval_tokens": 150,
        "tokenizer": str(root / "tokenizer"),
        "cache_dir": str(cache),
    } | task
    init = {"architecture": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}
    # Any: what train_rows() gives depends on the recipe
    made: Any = build(
        SimpleNamespace(
            task=TaskSection(**task),
            model=ModelSection(init=init),
            train=TrainSection(steps=1, global_batch=4, micro_batch=1),
            eval=EvalSection(splits=["validation", "test"]),
        )
    )
    return made


@pytest.mark.parametrize("bos", ["none", "block", "document"])
def test_rows_and_scored_tokens_are_those_of_the_cached_path(root, tmp_path, bos):
    cached = made(root, tmp_path / "cache", bos=bos)
    task = made(root, tmp_path / "none", bos=bos, streaming={"buffer": 1})
    rows, stream = cached.train_rows(), task.train_rows()
    assert isinstance(stream, Stream) and len(rows) > 60 and stream is task.train_rows()
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(stream[i], row)
    for split in ("validation", "test"):
        expected, found = cached.eval_sets(split), task.eval_sets(split)
        assert list(found) == list(expected) == ["art", "math"]
        for domain, scored in expected.items():
            assert len(scored) == len(found[domain]) >= 6
            for one, other in zip(scored, found[domain], strict=True):
                np.testing.assert_array_equal(one, other)
    assert not (tmp_path / "none").exists(), "nothing is kept"
    assert task.said()["held_out"] == cached.said()["held_out"]
    assert task.data_digest() == made(root, tmp_path, streaming={"buffer": 9}).data_digest()


def test_the_training_tokens_may_be_fewer(root, tmp_path):
    limits = {"max_train_tokens": 500}
    rows = made(root, tmp_path / "cache", **limits).train_rows()
    stream = made(root, tmp_path, streaming={"buffer": 1}, **limits).train_rows()
    assert len(rows) == 500 // 16
    for i in range(2 * len(rows)):
        np.testing.assert_array_equal(stream[i], rows[i % len(rows)])


def test_held_out_rows_need_a_number_or_a_file(root, tmp_path):
    with pytest.raises(DataError, match=r"the valid rows .* set task\.max_eval_tokens"):
        made(root, tmp_path, streaming={"buffer": 1}, max_eval_tokens=None)
    (tmp_path / "whole").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "whole" / f"{name}.txt").write_text("\n\n".join(TEXTS))
    task = made(
        root,
        tmp_path,
        data=str(tmp_path / "whole"),
        streaming={"buffer": 1},
        max_eval_tokens=None,
    )
    assert "held_out" not in task.said() and len(task.eval_sets("test")["whole"]) > 60


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("task.domain_column=topic", r"task\.domain_column = 'topic': which domains there are"),
        ("task.train=all", r"task\.train = 'all': a stream reads one domain after the other"),
        ("task.name=instruction", r"task\.name = instruction does not read task\.streaming"),
        ("task.streaming.buffer=0", r"task\.streaming\.buffer = 0: expected more than 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_by_name(given, expected):
    words = ["task.streaming={buffer: 10}", "train.epochs=null", "train.steps=999", given]
    with pytest.raises(RecipeError, match=expected):
        load("own_text", words)


def test_epochs_of_a_stream_are_refused():
    message = r"train\.epochs = 3: task\.streaming: .* set train\.steps instead"
    with pytest.raises(RecipeError, match=message):
        load("own_text", ["task.streaming={buffer: 10}"])


def test_other_libraries_words_lead_to_it():
    for theirs in ("buffer_size", "shuffle_buffer_size", "pretraining_dataset"):
        with pytest.raises(RecipeError, match=r"here it is task\."):
            load("own_text", [f"{theirs}=1"])
    for name in ("streaming", "task.buffer"):
        with pytest.raises(RecipeError, match=r"did you mean .*task\.streaming"):
            load("own_text", [f"{name}=1"])

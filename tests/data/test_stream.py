"""Rows of a stream: those of the cached path, in an order that is a function of position, buffer
and seed, and the same after a checkpoint."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from tests.data.test_m2d2 import offline_hub, put_in_hub_cache  # noqa: F401 (a fixture)
from tests.data.test_rows import write
from tram_ds.data import windows
from tram_ds.data.bpe import train_tokenizer
from tram_ds.data.choose import open_stream
from tram_ds.data.order import batch_indices
from tram_ds.data.own_text import OwnText
from tram_ds.data.stream import Stream, number_of, positions
from tram_ds.data.streamed import Tape
from tram_ds.data.tokenize import blocks, tokenize
from tram_ds.data.usable import Reading
from tram_ds.runtime.errors import DataError

TEXTS = [f"row {i} has {'many ' * (i % 9)}words\nand {i % 7} lines" for i in range(300)]
# which two windows cannot be joined in
TEXTS[200] = "x" * 2000
READING = Reading(held_out=0.1)
SEED, GLOBAL, WIDTH = 5, 4, 16
DOCUMENT = (256,)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """So that the texts are tokenised in many windows."""
    monkeypatch.setattr(windows.pieces, "__defaults__", (None, 900, 300))


@pytest.fixture
def folder(tmp_path):
    """Three files, a row of which cannot be used."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "train-0.jsonl", TEXTS[:120])
    with (folder / "train-0.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    write(folder / "train-1.jsonl", TEXTS[120:130])
    write(folder / "train-2.jsonl", TEXTS[130:])
    return folder


def cached(folder, tokenizer):
    source = OwnText(str(folder), READING, folder.parent / "cache")
    tokens = tokenize(source, "mine", "train", tokenizer, folder.parent / "cache", prefix=DOCUMENT)
    return blocks(tokens, WIDTH, keep_partial=False)


def streamed(folder, tokenizer, buffer, most=None):
    source = open_stream(str(folder), reading=READING)
    made = Stream(
        lambda place: Tape(source, "mine", tokenizer, DOCUMENT, place),
        WIDTH,
        buffer=buffer,
        seed=SEED,
        global_batch=GLOBAL,
        most=most,
        identity=f"of {buffer}",
    )
    return made, source


def same(rows, expected):
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row, want)


def test_without_a_buffer_the_rows_are_the_cached_ones_in_file_order_pass_after_pass(
    folder, tokenizer
):
    rows = cached(folder, tokenizer)
    stream, source = streamed(folder, tokenizer, 1)
    assert len(rows) > 150 and list(stream.tape.began.named) == []
    same([stream[i] for i in range(2 * len(rows) + 3)], [*rows, *rows, *rows[:3]])
    assert stream.said().endswith("3 passes begun") and "in file order" in stream.said()
    assert source.said() == {
        "held_out": "0.1 for valid and test, seed 0",
        "left_out": "1 row so far: train-0.jsonl line 121: text is 3, not text",
    }


def test_a_buffer_for_all_rows_gives_the_order_of_the_cached_path(folder, tokenizer):
    rows = cached(folder, tokenizer)
    stream, _ = streamed(folder, tokenizer, len(rows) + 7)
    for step in range(len(rows) // GLOBAL * 2):
        expected = [rows[i] for i in batch_indices(SEED, step, GLOBAL, len(rows))]
        same([stream[i] for i in positions(stream, SEED, step, GLOBAL)], expected)
    assert number_of(stream) is None and number_of(rows) == len(rows)


def test_a_row_goes_no_further_than_its_buffer_and_none_is_lost(folder, tokenizer):
    rows = cached(folder, tokenizer)
    stream, _ = streamed(folder, tokenizer, 40)
    found = [stream[i] for i in range(len(rows))]
    for start in range(0, len(rows), 40):
        part, want = found[start : start + 40], rows[start : start + 40]
        assert sorted(map(tuple, part)) == sorted(map(tuple, want))
        assert any(tuple(a) != tuple(b) for a, b in zip(part, want, strict=True))
    orders = [np.random.Philox(key=np.array([SEED, n], dtype=np.uint64)) for n in range(2)]
    for number, words in enumerate(orders):  # by its definition
        order = np.argsort(words.random_raw(40), kind="stable") + 40 * number
        same(found[40 * number : 40 * number + 40], [rows[int(i)] for i in order])


@pytest.mark.parametrize("buffer", [1, 7, 64, 1000])
def test_a_checkpoint_goes_on_with_the_same_rows_at_any_number_of_ranks(folder, tokenizer, buffer):
    """Each rank holds its own stream, and asks for its share alone; the state is rank 0's."""
    whole, _ = streamed(folder, tokenizer, buffer)
    steps = 110
    expected = [whole[i] for i in range(steps * GLOBAL)]

    def share(stream, step, rank, world):
        each = GLOBAL // world
        mine = positions(stream, SEED, step, GLOBAL)[rank * each : (rank + 1) * each]
        return [(i, stream[i]) for i in mine]

    cuts = [0, 3, 29, 50, 51, steps]
    kept = {}
    for world, (begin, end) in zip((2, 1, 4, 2, 1), pairwise(cuts), strict=True):
        ranks = [streamed(folder, tokenizer, buffer)[0] for _ in range(world)]
        for rank, stream in enumerate(ranks):
            stream.load(kept)
            for step in range(begin, end):
                for position, row in share(stream, step, rank, world):
                    np.testing.assert_array_equal(row, expected[position])
        kept = json.loads(json.dumps(ranks[0].kept_at(end * GLOBAL)))
        assert kept["stream"]["position"] <= end * GLOBAL
        if buffer < 64 and begin:  # what comes before is not read again
            assert kept["stream"]["position"] > end * GLOBAL - 64


def test_what_comes_before_a_checkpoint_is_not_read_again(folder, tokenizer):
    stream, source = streamed(folder, tokenizer, 8)
    at = 150
    expected = [stream[i] for i in range(at + 60)][at:]
    kept = json.loads(json.dumps(stream.kept_at(at)))
    place = kept["stream"]["text"]
    assert place["file"] == 2 and place["window"][0] > 900 and place["row"] > 0
    (folder / "train-0.jsonl").write_text("[]")
    (folder / "train-1.jsonl").unlink()
    stream.load(kept)
    same([stream[i] for i in range(at, at + 60)], expected)
    assert source.said()["left_out"].startswith("1 row so far: train-0.jsonl line 121")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "kind"),
    [(".jsonl", "json"), (".json", "json"), (".csv", "csv"), (".parquet", "parquet")],
)
def test_the_rows_are_those_that_datasets_streams(tmp_path, ending, kind):
    from datasets import load_dataset

    path = write(tmp_path / f"a{ending}", TEXTS)
    theirs = load_dataset(
        kind, data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path / "c")
    )
    source = open_stream(str(path), reading=Reading(held_out=1e-9))
    assert list(source.read("a", "train")) == [f"{row['text']}\n" for row in theirs]


def test_positions_that_are_gone_are_read_again(folder, tokenizer):
    stream, _ = streamed(folder, tokenizer, 8)
    first = stream[3]
    stream[150]
    assert stream.held[0].state.position > 3
    np.testing.assert_array_equal(stream[3], first)


def test_a_checkpoint_of_another_stream_or_of_changed_files_is_not_gone_on_from(folder, tokenizer):
    stream, _ = streamed(folder, tokenizer, 8)
    kept = [stream.kept_at(position) for position in (64, 65) if stream[position] is not None]
    other, _ = streamed(folder, tokenizer, 9)
    other.load(kept[0])
    assert other.state.position == 0
    write(folder / "train-0.jsonl", [text.upper() for text in TEXTS[:120]])
    changed, _ = streamed(folder, tokenizer, 8)
    changed.load(kept[1])
    with pytest.raises(DataError, match="not what it was when the checkpoint was written"):
        changed[65]


def test_the_next_buffer_is_read_while_rows_of_this_one_are_asked_for(folder, tokenizer):
    stream, _ = streamed(folder, tokenizer, 40)
    for position in (0, 7, 39, 40, 61):
        stream[position]
        assert stream.filling is not None and stream.filling.count == position % 40 + 1
        assert stream.kept_at(position)["stream"]["position"] == position // 40 * 40


def test_a_pass_ends_where_the_recipe_says(folder, tokenizer):
    rows = cached(folder, tokenizer)
    stream, _ = streamed(folder, tokenizer, 1, most=10)
    same([stream[i] for i in range(25)], [*rows[:10], *rows[:10], *rows[:5]])


def test_a_data_set_of_the_hub_is_streamed_as_its_files_are(
    offline_hub,  # noqa: F811
    folder,
    tokenizer,
    tmp_path,
):
    """Without a network, from the hub's cache: the same rows and, behind a checkpoint, the same
    again."""
    names = {f"data/{path.name}": path for path in sorted(folder.iterdir())}
    put_in_hub_cache(offline_hub, "somebody/mine", names)

    def rows(source):
        stream = Stream(
            lambda place: Tape(source, "mine", tokenizer, (), place),
            WIDTH,
            buffer=7,
            seed=3,
            global_batch=4,
        )
        return [stream[i] for i in range(30)], stream.kept_at(20)

    of_hub, kept = rows(open_stream("somebody/mine", reading=READING))
    local, kept_too = rows(open_stream(str(folder), reading=READING))
    same(of_hub, local)
    assert kept == kept_too
    with pytest.raises(DataError, match=r"cannot get files of rows .* of the hub data set a/b"):
        open_stream("a/b", reading=READING)


def test_what_cannot_be_streamed_is_refused(folder, tokenizer, tmp_path):
    for name in ("generated", "installed_docs", "machelreid/m2d2", str(tmp_path / "none")):
        with pytest.raises(DataError, match=r"task\.streaming is for files of rows"):
            open_stream(name)
    (tmp_path / "short.jsonl").write_text('{"text": "few"}\n')
    with pytest.raises(DataError, match=r"no row of 16 tokens"):
        source = open_stream(str(tmp_path / "short.jsonl"), reading=Reading(held_out=1e-9))
        Stream(
            lambda place: Tape(source, "short", tokenizer, (), place),
            WIDTH,
            buffer=1,
            seed=0,
            global_batch=1,
        )
    with pytest.raises(DataError, match=r"tokenises a text only as a whole"):
        Tape(open_stream(str(folder)), "mine", object(), ())

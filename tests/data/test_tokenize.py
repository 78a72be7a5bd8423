"""Tokens on disk: never torn, never stale, whoever builds them; and the same however the text was
chunked."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tram_ds.data.tokenize import blocks, lines, tokenize, write_tokens
from tram_ds.runtime.errors import DataError

TEXT = (
    "".join(f"line {i} with some words, é and {'x' * (i % 7)}\n" for i in range(300))
    + "no newline at the end"
)


class ByteTokenizer:
    """Ids are bytes plus an offset."""

    def __init__(self, offset=0):
        self.offset = offset

    def __len__(self):
        return 256 + self.offset

    def __repr__(self):
        return f"ByteTokenizer({self.offset})"

    def get_vocab(self):
        return {str(i): i for i in range(len(self))}

    def __call__(self, texts, **_):
        return {"input_ids": [[byte + self.offset for byte in text.encode()] for text in texts]}


class SlowSource:
    """Hands out TEXT in two chunks; reports the first on standard output and waits `seconds` before
    the second."""

    def __init__(self, seconds=0.0, text=TEXT):
        self.seconds, self.text = seconds, text

    def read(self, domain, split):
        yield self.text[:5000]
        if self.seconds:
            print("half way", flush=True)
            time.sleep(self.seconds)
        yield self.text[5000:]

    def digest(self, domain, split):
        return hashlib.sha256(self.text.encode()).hexdigest()


def ids_of(text, offset=0):
    return [byte + offset for byte in text.encode()]


def start_builder(cache, seconds):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, __file__, str(cache), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_cache_holds_the_ids_is_private_and_is_not_built_twice(tmp_path):
    tokens = tokenize(SlowSource(), "math", "train", ByteTokenizer(), tmp_path)
    assert (
        tokens.tolist() == ids_of(TEXT) and tokens.dtype == np.uint16 and not tokens.flags.writeable
    )
    assert tokenize(_unreadable(), "math", "train", ByteTokenizer(), tmp_path).tolist() == ids_of(
        TEXT
    )
    (folder,) = (tmp_path / "tokens").glob("math-train-*")
    header = json.loads((folder / "header.json").read_text())
    assert header["sha256"] == hashlib.sha256((folder / "tokens.bin").read_bytes()).hexdigest()
    assert (header["count"], header["vocab_size"]) == (len(tokens), 256)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}


def test_another_tokenizer_or_text_gets_its_own_tokens(tmp_path):
    assert tokenize(SlowSource(), "math", "train", ByteTokenizer(), tmp_path).tolist() == ids_of(
        TEXT
    )
    wide = tokenize(SlowSource(), "math", "train", ByteTokenizer(70_000), tmp_path)
    assert wide.tolist() == ids_of(TEXT, 70_000) and wide.dtype == np.uint32
    assert tokenize(
        SlowSource(text="new"), "math", "train", ByteTokenizer(), tmp_path
    ).tolist() == ids_of("new")


def test_max_tokens_is_the_beginning_of_the_whole(tmp_path):
    assert (
        tokenize(SlowSource(), "math", "train", ByteTokenizer(), tmp_path, 1234).tolist()
        == ids_of(TEXT)[:1234]
    )


@pytest.mark.parametrize("damage", ["shorter", "header", "missing"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    tokenize(SlowSource(), "math", "train", ByteTokenizer(), tmp_path)
    (folder,) = (tmp_path / "tokens").glob("math-train-*")
    if damage == "shorter":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])
    elif damage == "header":
        (folder / "header.json").write_text('{"count": 3')
    else:
        (folder / "tokens.bin").unlink()
    assert tokenize(SlowSource(), "math", "train", ByteTokenizer(), tmp_path).tolist() == ids_of(
        TEXT
    )


def test_a_builder_killed_half_way_leaves_nothing_that_is_used(tmp_path):
    builder = start_builder(tmp_path, seconds=60)
    assert builder.stdout is not None and builder.stdout.readline() == "half way\n"
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    folder = tmp_path / "tokens"
    assert [p.name for p in folder.glob(".*tmp-*")] and not list(folder.glob("math-train-*"))
    assert tokenize(SlowSource(), "math", "train", ByteTokenizer(), tmp_path).tolist() == ids_of(
        TEXT
    )
    assert not list(folder.glob(".*tmp-*"))


@pytest.mark.parametrize("flock", [True, False])
def test_two_builders_at_once_agree(tmp_path, monkeypatch, flock):
    if not flock:  # as on a file system without locks: both build, the loser discards its copy
        import fcntl

        monkeypatch.setattr(fcntl, "flock", _refuse)
    builder = start_builder(tmp_path, seconds=1)
    assert builder.stdout is not None and builder.stdout.readline() == "half way\n"
    tokens = tokenize(SlowSource(), "math", "train", ByteTokenizer(), tmp_path)
    printed = builder.stdout.read().strip()
    assert builder.wait() == 0
    assert tokens.tolist() == ids_of(TEXT)
    assert printed == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert len(list((tmp_path / "tokens").glob("math-train-*"))) == 1
    assert not list((tmp_path / "tokens").glob(".*tmp-*"))


def test_tokens_do_not_depend_on_chunks(tmp_path):
    from tram_ds.data.bpe import train_tokenizer

    tokenizer = train_tokenizer(TEXT.splitlines(), 300)
    text = TEXT + "\n\n\n  indented and \t trailing  \n" + "z" * 500 + "\n"
    whole = tokenizer(text)["input_ids"]
    for chunk in (1, 7, 1000, 10**6):
        chunks = (text[i : i + chunk] for i in range(0, len(text), chunk))
        header = write_tokens(tmp_path / "tokens", chunks, tokenizer)
        tokens = np.fromfile(tmp_path / "tokens", dtype=header["dtype"])
        assert tokens.tolist() == whole
    assert tokenizer.decode(whole) == text


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 64, 1000])
def test_lines_are_cut_at_the_limit_whatever_the_chunks(chunk):
    text = "a" * 25 + "\n" + "b" * 10 + "\n" + "c" * 9 + "\n\n" + "d" * 20
    expected = [
        "a" * 10,
        "a" * 10,
        "aaaaa\n",
        "b" * 10,
        "\n",
        "c" * 9 + "\n",
        "\n",
        "d" * 10,
        "d" * 10,
    ]
    assert (
        list(lines((text[i : i + chunk] for i in range(0, len(text), chunk)), limit=10)) == expected
    )


def test_empty_text_is_refused_and_leaves_no_cache(tmp_path):
    with pytest.raises(DataError, match="train split of domain 'math' holds no text"):
        tokenize(SlowSource(text=""), "math", "train", ByteTokenizer(), tmp_path)
    assert not list((tmp_path / "tokens").glob("math*"))


def test_blocks_cut_consecutive_rows():
    tokens = np.arange(23, dtype=np.uint16)
    train, evaluation = blocks(tokens, 5, keep_partial=False), blocks(tokens, 5, keep_partial=True)
    assert [row.tolist() for row in train] == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert [len(row) for row in evaluation] == [5, 5, 5, 5, 3]
    assert (
        np.concatenate(list(evaluation)).tolist() == tokens.tolist()
        and evaluation[-1].dtype == np.int64
    )
    assert len(blocks(tokens[:21], 5, keep_partial=True)) == 4  # one token predicts nothing
    with pytest.raises(IndexError):
        train[4]


def test_bpe_is_the_same_in_every_process_and_round_trips():
    from tram_ds.data.bpe import train_tokenizer

    code = (
        "import hashlib; from tram_ds.data.bpe import train_tokenizer;"
        "texts = [f'word{i % 37} other{i % 11} thing{i}' for i in range(3000)];"
        "t = train_tokenizer(texts, 400); "
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    texts = [f"word{i % 37} other{i % 11} thing{i}" for i in range(3000)]
    here = train_tokenizer(texts, 400)
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ
        | {"RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ).stdout.strip()
    assert hashlib.sha256(here.backend_tokenizer.to_str().encode()).hexdigest() == there
    assert here.decode(here("naïve Ω\n\ttext")["input_ids"]) == "naïve Ω\n\ttext"
    assert len(here) == 400


def _unreadable():
    source = SlowSource()
    source.read = lambda domain, split: pytest.fail("read again")
    return source


def _refuse(descriptor, operation):
    raise OSError("no locks here")


if __name__ == "__main__":  # a builder process of the tests above
    built = tokenize(
        SlowSource(float(sys.argv[2])), "math", "train", ByteTokenizer(), Path(sys.argv[1])
    )
    print(hashlib.sha256(built.tobytes()).hexdigest())

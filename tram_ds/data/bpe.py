"""A small byte-level BPE tokeniser trained on a source's own text, for when no pre-trained one is
given."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.data.sources import Source
from tram_ds.data.tokenize import lines
from tram_ds.runtime.errors import DataError

VERSION = 1  # raise it when the training changes: it is part of the cache key
VOCAB_SIZE = 4096
SAMPLE_CHARS = 8_000_000  # read over all domains, the same share from each
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` entries, the 256 bytes and <|endoftext|> among them.

    The same texts give the same tokeniser, whatever the number of threads.
    """
    if vocab_size < 257:
        raise DataError(
            f"vocab_size {vocab_size} is too small: the 256 bytes and {END_OF_TEXT} need 257"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # all 256 bytes, also those that the texts lack: no later text has an unknown one
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def source_tokenizer(
    source: Source, cache_dir: str | os.PathLike[str] | None = None, vocab_size: int = VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """The tokeniser of a source: trained on the beginning of every train split it has, cached by
    that text."""
    domains = [domain for domain in source.domains() if "train" in source.splits(domain)]
    if not domains:
        raise DataError(
            "no domain has train text to build a tokeniser from; set task.tokenizer to a "
            "tokeniser folder"
        )
    samples = {
        domain: _beginning(source.read(domain, "train"), SAMPLE_CHARS // len(domains))
        for domain in domains
    }
    # by the samples, not by the source: text behind them changes no tokeniser
    key = digest_of(VERSION, vocab_size, *samples.keys(), *samples.values())
    path = cache_root(cache_dir) / "tokenizers" / key

    def build(folder: Path) -> None:
        texts = (line for text in samples.values() for line in lines([text]))
        train_tokenizer(texts, vocab_size).save_pretrained(folder)

    return PreTrainedTokenizerFast.from_pretrained(build_once(path, build, _complete))


def _complete(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()


def _beginning(chunks: Iterable[str], length: int) -> str:
    """The first `length` characters of a chunked text, reading no more chunks than that takes."""
    taken, size = [], 0
    for chunk in chunks:
        taken.append(chunk[: length - size])
        size += len(taken[-1])
        if size >= length:
            break
    return "".join(taken)

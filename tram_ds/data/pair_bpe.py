"""A small byte-level BPE tokeniser for sentence pairs, for fresh models: special tokens have the
ids models expect."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.runtime.errors import DataError

VERSION = 1  # raise it when the training changes: it is part of the cache key
VOCAB_SIZE = 4096
# XLM-R's ids; its position ids start after the padding's
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def pair_tokenizer(
    digest: str,
    texts: Iterable[str],
    cache_dir: str | os.PathLike[str] | None = None,
    vocab_size: int = VOCAB_SIZE,
) -> PreTrainedTokenizerFast:
    """Pairs become <s> a </s></s> b </s>. Trained once on `texts`, whose digest is `digest`, and
    kept in the cache."""
    if vocab_size < 256 + len(SPECIAL):
        raise DataError(
            f"vocab_size {vocab_size} is too small: the 256 bytes and {', '.join(SPECIAL)} need 260"
        )
    path = cache_root(cache_dir) / "tokenizers" / f"pairs-{digest_of(VERSION, vocab_size, digest)}"

    def build(folder: Path) -> None:
        _train(texts, vocab_size).save_pretrained(folder)

    return PreTrainedTokenizerFast.from_pretrained(build_once(path, build, _complete))


def _train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start, _, end, _ = ((token, number) for number, token in enumerate(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[start, end]
    )
    names = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "sep_token": "</s>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def _complete(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()

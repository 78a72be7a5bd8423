"""A recipe's model and micro-batch without weights and data: modules on the meta device, and the
shapes of what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tram_ds.engines.filling import materialise
from tram_ds.models import adapters
from tram_ds.models.config import load_config
from tram_ds.models.pretrained import checkpoint_activations
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


def model(recipe: Recipe) -> nn.Module:
    """The recipe's model as an engine gets it, in fp32 and train mode, on the meta device: with its
    adapters and activation checkpointing. No network for the models among PATHS."""
    section = section_of(recipe.model)
    config = config_of(section, recipe.task.name, recipe.task.seq_len)
    found = on_meta(config, section, recipe.task.name, torch.float32)
    if section.activation_checkpointing:
        checkpoint_activations(found)
    return found


def batch(recipe: Recipe) -> dict[str, Tensor]:
    """A micro-batch of one rank: the shapes of the recipe's, without padding."""
    task, rows, seq_len = recipe.task.name, recipe.train.micro_batch, recipe.task.seq_len
    found = batch_of(config_of(section_of(recipe.model), task, seq_len), task, rows, seq_len)
    if HEADS[task] != "AutoModelForCausalLM":
        found["labels"] = torch.zeros(rows, dtype=torch.long)
    return found


def materialise_all(model: nn.Module) -> None:
    """Everything on meta, sharded or whole, becomes what the mode around this says memory is."""
    materialise(model, lambda p: torch.empty_like(p, device="cpu"))
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def on_meta(config: Any, section: ModelSection, task: str, dtype: torch.dtype) -> nn.Module:
    """A model of this configuration, with the section's adapters, in train mode."""
    import transformers
    from transformers.initialization import no_init_weights

    attention = "eager" if section.attention == "eager" else "sdpa"
    auto = getattr(transformers, HEADS[task])
    # on meta: peft moves what it makes to another memory, which fake tensors do not allow
    with torch.device("meta"), no_init_weights():
        model: nn.Module = auto.from_config(
            config, dtype=dtype, attn_implementation=attention
        ).train()
        model.tie_weights()  # type: ignore[operator]  # part of the initialisation left out above
        if section.lora is not None:
            adapters.add(model, section, seed=0)
    return model


def section_of(section: ModelSection) -> ModelSection:
    """With model.init in place of a path that is among PATHS."""
    name = PATHS.get(section.path or "")
    if name is None:
        return section
    return ModelSection.model_validate(
        {**section.model_dump(), "path": None, "revision": None, "init": CONFIGS[name]}
    )


def config_of(section: ModelSection, task: str, seq_len: int) -> Any:
    """The configuration the task would build the model with, attention without dropout."""
    from tram_ds.data.bpe import VOCAB_SIZE

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


def length_of(config: Any, task: str, seq_len: int) -> int:
    """Tokens of one row: an image is its patches and the class token."""
    if task != "image_classification":
        return seq_len
    side, patch = (
        v if isinstance(v, int) else v[0] for v in (config.image_size, config.patch_size)
    )
    return (side // patch) ** 2 + 1


def batch_of(config: Any, task: str, rows: int, seq_len: int) -> dict[str, Tensor]:
    """What the model is called with."""
    if task == "image_classification":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(rows, getattr(config, "num_channels", 3), side, side)}
    return {"input_ids": torch.randint(2, min(config.vocab_size, 100), (rows, seq_len))}

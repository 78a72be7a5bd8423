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

from tram_ds.engines.layout import vocabulary_units
from tram_ds.models.chunked import chunkable
from tram_ds.planning import outline
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.recipe import Recipe


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
    embedding, head: of root, those of the input embedding and of the output head, 0 where they are
    tied.
    trained, trained_block, trained_root, trained_embedding, trained_head: of parameters, block,
    root, embedding, head those that train: all, or adapters. trained_rows: rows of those with two
    dimensions or more, by the first. head_trained: whether the output head does, also tied.
    largest: elements of the largest parameter.
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
    embedding: int
    head: int
    trained_embedding: int
    trained_head: int
    largest: int


@dataclass(frozen=True)
class _Trace:
    parameters: int
    trained: int
    rows: int
    head_trained: bool
    own: dict[str, int]  # of ModelSize: largest, embedding, head and what of them trains
    saved: int
    flops: int
    outputs: tuple[int, ...]
    chunkable: bool


def size(recipe: Recipe, autocast: bool = False) -> ModelSize:
    """The ModelSize of a recipe's model and micro-batch. autocast: fp32 weights cast inside the
    operators, as `replicated` does.

    A model.path among outline.PATHS needs no network; any other is looked up as training would.
    Blocks are alike, so a model of one
    block and one of two say all: the rest is multiplication.
    """
    section = outline.section_of(recipe.model)
    key = section.model_dump_json(exclude={"activation_checkpointing"})
    return _size(key, recipe.task.name, recipe.task.seq_len, recipe.train.micro_batch, autocast)


@cache
def _size(section_json: str, task: str, seq_len: int, rows: int, autocast: bool) -> ModelSize:
    section = ModelSection.model_validate_json(section_json)
    config = outline.config_of(section, task, seq_len)
    layers = int(config.num_hidden_layers)
    one, two = (
        _trace(_cut(config, depth), section, task, rows, seq_len, autocast) for depth in (1, 2)
    )
    block, saved = two.parameters - one.parameters, two.saved - one.saved
    trained_block = two.trained - one.trained
    length = outline.length_of(config, task, seq_len)
    text = outline.HEADS[task] == "AutoModelForCausalLM"
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
        **one.own,
    )


def _cut(config: Any, depth: int) -> Any:
    """The same configuration with `depth` blocks."""
    short = type(config).from_dict(config.to_dict())
    short.num_hidden_layers, short.use_cache = depth, False
    if getattr(short, "layer_types", None):
        short.layer_types = config.layer_types[:depth]
    return short


def _trace(
    config: Any, section: ModelSection, task: str, rows: int, seq_len: int, autocast: bool
) -> _Trace:
    half = section.dtype == "bfloat16"
    dtype = torch.bfloat16 if half and not autocast else torch.float32
    model = outline.on_meta(config, section, task, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        outline.materialise_all(model)
        batch = outline.batch_of(config, task, rows, seq_len)
        # pixels in the weights' precision: a convolution takes no two
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        # autograd keeps the weights too, which are counted already; views share one storage
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
        # apart from the activations: chunks never hold them
        saved.pop(logits.untyped_storage()._cdata, None)
        return _Trace(
            sum(p.numel() for p in model.parameters()),
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(len(p) for p in model.parameters() if p.requires_grad and p.dim() > 1),
            _head_trained(model),
            _own(model),
            sum(storage.nbytes() for storage in saved.values()),
            flops.get_total_flops(),
            tuple(logits.shape),
            chunkable(model),
        )


def _own(model: nn.Module) -> dict[str, int]:
    units = {
        "embedding" if isinstance(part, nn.Embedding) else "head": list(part.parameters())
        for part in vocabulary_units(model)
    }
    found = {name: units.get(name, []) for name in ("embedding", "head")}
    return {
        "largest": max(p.numel() for p in model.parameters()),
        **{name: sum(p.numel() for p in of) for name, of in found.items()},
        **{
            f"trained_{name}": sum(p.numel() for p in of if p.requires_grad)
            for name, of in found.items()
        },
    }


def _head_trained(model: nn.Module) -> bool:
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head is None or any(p.requires_grad for p in head.parameters())


def _flash(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# the fake tensors are on the CPU, whose flash kernel torch's counter takes for no FLOPs
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash}

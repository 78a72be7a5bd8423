"""Hugging Face models as every task builds them: from a path, or freshly initialised from a
config.

Remote code is never run: no recipe can turn it on. Everything a user can get wrong here is a
DataError.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers import (
    GenerationConfig,
    PretrainedConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tram_ds.models import adapters, converted, drawn, pickled, stored, tied
from tram_ds.models.config import load_config, revision
from tram_ds.models.whole import refuse_incomplete
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import first_line

# of one block: train or eval, with gradient or without, with a mask or without, lengths fixed or
# changing
GRAPHS = 32


def load_model(
    auto_class: Any,
    section: Any,
    *,
    seed: int = 0,
    new_head: bool = False,
    cache_dir: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """The model on CPU in fp32 and train mode.

    auto_class: AutoModelForCausalLM and its like. seed: of a fresh initialisation (the whole model
    or a new head); the global random state is left as it was. new_head: allow `model.path` to lack
    the head's weights, or to have them in another size; the model's `new_weights` lists those
    initialised here. cache_dir: of load_stored.
    overrides: as in load_config.
    """
    return _build(auto_class, section, _load_weights, seed, new_head, overrides)


def load_stored(
    auto_class: Any,
    section: Any,
    *,
    seed: int = 0,
    new_head: bool = False,
    cache_dir: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """As load_model, with the parameters that `model.path` has left in its files, and those of
    `model.init` not drawn yet: they are on the meta device, and `model.stored` (models/stored.py)
    reads or draws them, so that an engine never holds more than its shards. Where `model.path` has
    pickles alone, these files are their copy in the cache (models/converted.py). cache_dir: the
    cache; None is the user's.

    A model whose tensors transformers merges or splits, one whose tied weights differ in the files
    and one that cannot be drawn tensor by tensor are loaded whole, as by load_model;
    `model.loaded_whole` then says why.
    """

    def leave(*args: Any) -> nn.Module:
        return _leave_weights(*args, cache_dir=cache_dir)

    return _build(auto_class, section, leave, seed, new_head, overrides)


def load_outline(
    auto_class: Any,
    section: Any,
    *,
    seed: int = 0,
    new_head: bool = False,
    cache_dir: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """The model's modules on the meta device, without a weight and without adapters: for what can
    be refused by their names. DataError for targets of model.lora that match none."""
    with torch.device("meta"):
        model = auto_class.from_config(load_config(section, **overrides), dtype=torch.float32)
    if getattr(section, "lora", None) is not None:
        adapters.check(model, section)
    return model


def load_base(
    auto_class: Any, section: Any, *, seed: int = 0, new_head: bool = False, **overrides: Any
) -> nn.Module:
    """As load_model, without the adapters of model.lora."""
    bare = section.model_copy(update={"lora": None})
    return load_model(auto_class, bare, seed=seed, new_head=new_head, **overrides)


def _build(
    auto_class: Any, section: Any, load: Any, seed: int, new_head: bool, overrides: dict[str, Any]
) -> nn.Module:
    if section.path is not None and Path(section.path).is_dir():
        refuse_incomplete(Path(section.path))
    config = load_config(section, **overrides)
    options = {
        "dtype": torch.float32,
        "attn_implementation": getattr(section, "attention", None) or "sdpa",
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = load(auto_class, section, config, new_head, options)
        if section.path is None:
            model.new_weights = sorted(name for name, _ in model.named_parameters())
    except DataError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError, KeyError) as error:
        name = section.path or f"init: {dict(section.init)}"
        attention = options["attn_implementation"]
        way_out = "" if attention == "eager" else " (model.attention=eager works for every model)"
        raise DataError(
            f"cannot build '{name}' with model.attention={attention}{way_out}: {first_line(error)}"
        ) from error
    if getattr(section, "lora", None) is not None:
        adapters.add(model, section, seed)
    if getattr(section, "activation_checkpointing", False):
        checkpoint_activations(model)
    if getattr(section, "compile", False):
        _compile_blocks(model)
    return model.train()


def _load_weights(
    auto_class: Any, section: Any, config: PretrainedConfig, new_head: bool, options: dict
) -> nn.Module:
    if section.path is None:
        return auto_class.from_config(config, **options)
    pickled.check(section.path, revision(section))
    model, report = auto_class.from_pretrained(
        section.path,
        config=config,
        revision=revision(section),
        output_loading_info=True,
        ignore_mismatched_sizes=new_head,
        trust_remote_code=False,
        **options,
    )
    _check_report(section.path, model, report, new_head)
    return model


def _leave_weights(
    auto_class: Any,
    section: Any,
    config: PretrainedConfig,
    new_head: bool,
    options: dict,
    *,
    cache_dir: str | None,
) -> nn.Module:
    if section.path is None:
        return _leave_undrawn(auto_class, section, config, options)
    with torch.device("meta"):
        # for its class alone: which one a config asks for is the auto class's to know
        kind = type(auto_class.from_config(config, **options))
    try:
        _refuse_dora(section)
        files = _files(section, cache_dir)
        model, report = stored.read_model(
            kind, files, config=config, ignore_mismatched_sizes=new_head, **options
        )
        tied.refuse_different(model, files)
    except stored.NotSlices as why:
        whole: Any = _load_weights(auto_class, section, config, new_head, options)
        whole.loaded_whole = f"'{section.path}' is loaded whole on every rank: {why}"
        return whole
    _check_report(section.path, model, report, new_head)
    _as_from_path(model, section)
    return model


def _leave_undrawn(
    auto_class: Any, section: Any, config: PretrainedConfig, options: dict
) -> nn.Module:
    generator = torch.get_rng_state()
    try:
        _refuse_dora(section)
        model, draws = drawn.build(lambda: auto_class.from_config(config, **options))
        made = {name: p.detach() for name, p in model.named_parameters() if name not in draws}
        stored.leave(model, draws, made)
        return model
    # Whatever code of transformers makes of tensors without memory. What is wrong with the config
    # is raised again.
    except Exception as why:
        said = f"model.init is drawn whole on every rank: {first_line(why)}"
    torch.set_rng_state(generator)
    whole = auto_class.from_config(config, **options)
    whole.loaded_whole = said
    return whole


def _refuse_dora(section: Any) -> None:
    lora = getattr(section, "lora", None)
    if lora is not None and lora.dora:
        raise stored.NotSlices("model.lora.dora begins with the norms of its weights")


def _files(section: Any, cache_dir: str | None) -> dict[str, stored.Entry]:
    where = section.path, revision(section)
    if files := stored.entries(*where) or converted.entries(*where, cache_dir):
        return files
    raise stored.NotSlices(
        "it has no safetensors files (from_pretrained and save_pretrained of transformers write "
        "them)"
    )


def _check_report(path: str, model: Any, report: Any, new_head: bool) -> None:
    """DataError where weights would be made up, or left out, without a word."""
    missing = sorted(stored.lacking(report))
    model.new_weights = missing
    extra = [] if new_head else sorted(report["unexpected_keys"])
    if new_head:
        missing = [
            key
            for key in missing
            if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key
        ]
    found = [
        f"{verb} {len(keys)} weights ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for verb, keys in (("lacks", missing), ("has in excess", extra))
        if keys
    ]
    if found:
        raise DataError(
            f"'{path}' {' and '.join(found)} of {type(model).__name__}: it was saved from another "
            "kind of model; give a path that fits the task"
        )


def _as_from_path(model: Any, section: Any) -> None:
    """What from_pretrained takes from a path beside the weights, and an export writes again."""
    model.name_or_path = model.config._name_or_path = str(section.path)
    if model.can_generate():
        with contextlib.suppress(OSError):  # a model need not have one
            model.generation_config = GenerationConfig.from_pretrained(
                section.path, revision=revision(section)
            )


def checkpoint_activations(model: Any) -> None:
    """Blocks keep their inputs and are computed again in the backward pass. DataError for a model
    that cannot."""
    if not model.supports_gradient_checkpointing:
        raise DataError(
            f"{type(model).__name__} has no activation checkpointing; remove "
            "model.activation_checkpointing"
        )
    # reentrant recomputation gives no gradient where no input of the block has one, as under
    # adapters, whose embeddings are frozen
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _compile_blocks(model: nn.Module) -> None:
    """In place: names, state dicts and ties stay. Blocks are what Hugging Face can checkpoint; they
    share their graphs."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise DataError(
            f"{type(model).__name__} has no repeated transformer blocks to compile; remove "
            "model.compile"
        )
    # Beyond the limit (8 by default) a new graph would not be compiled, and the run would go on
    # slowly without a word.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(GRAPHS, dynamo.recompile_limit)
    for block in blocks:
        block.compile()

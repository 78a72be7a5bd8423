"""LoRA adapters in a Hugging Face model, by peft: low-rank matrices that are trained in place of
the linear layers' weights, which stay as they are.

The model stays the class it is: peft's layers stand where its linear layers stood. A = random,
B = 0 at the start, so a model with fresh adapters is, as a function, the model without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers.pytorch_utils import Conv1D

from tram_ds.engines.filling import materialise
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.wording import hint

NAME = "default"  # peft's own, which its loader expects
HEADS = ("classifier", "score")  # of classifiers: too small, and too often new, to be adapted
PREFIX = "base_model.model."  # before every name in an adapter's file


def add(model: Any, section: Any, seed: int) -> None:
    """Adapters of the recipe's `model.lora` into `model`, in place; all else is frozen, but heads
    of classifiers and weights that `model.path` lacks, which train whole.

    seed: of A. The same values whether the base is in memory or still on meta (models/stored.py).
    DataError for targets that match nothing, and for a model whose buffers train.
    """
    peft = library()
    names, lora = _targets(model, section), section.lora
    if any(isinstance(m, _NormBase) and m.track_running_stats for m in model.modules()):
        raise DataError(
            f"model.lora: {type(model).__name__} trains running statistics (batch norm), which an "
            "adapter's file has no place for: remove model.lora"
        )
    stored, heads = getattr(model, "stored", None), _heads(model, section)
    if stored is not None:
        _bring(model, heads, stored)
    before = {id(p): name for name, p in model.named_parameters()}
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=sorted(names),
        # a head trains whole, so no adapter inside it
        exclude_modules=rf"(.*\.)?({'|'.join(heads)})(\..*)?" if heads else None,
        modules_to_save=heads or None,
        # GPT-2's Conv1D has its weight the other way round
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        base_model_name_or_path=section.path,
        revision=section.revision,
        inference_mode=False,
    )
    # A and B on meta, for _draw; DoRA's magnitudes are made of them at once
    peft.inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=not lora.dora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                _draw(layer)
    if stored is not None:
        stored.follow(before, model)


def library() -> Any:
    """peft, imported where adapters are asked for. DataError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise DataError(
            "model.lora needs the package peft, which is not installed: pip install peft, or "
            "remove model.lora"
        ) from error
    return peft


def check(model: nn.Module, section: Any) -> None:
    """DataError for targets that match nothing. `model` may be on meta."""
    library()
    _targets(model, section)


def _targets(model: Any, section: Any) -> set[str]:
    """Names, or their ends, of the layers to adapt: those asked for, or every linear layer but the
    output head and classifiers' heads."""
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    ends = {_end(name) for name in linear}
    if section.lora.targets is None:
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        named = dict(model.named_modules())
        inner = {n for n in linear if named[n] is not head and n.partition(".")[0] not in HEADS}
        if not inner:
            raise DataError(
                f"model.lora: {type(model).__name__} has no linear layer to adapt: remove it"
            )
        return {_end(name) for name in inner}
    for target in section.lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise DataError(
                f"model.lora.targets: {target} is no linear layer of {type(model).__name__}"
                f"{hint(target, ends)}; it has {', '.join(sorted(ends))}"
            )
    return set(section.lora.targets)


def _end(name: str) -> str:
    """The last part of a name; all of it where that is a number, which many lists have."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def _heads(model: Any, section: Any) -> list[str]:
    """Modules that train whole, beside the adapters."""
    heads = [name for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if section.path is None:
        return heads
    new = {name.rpartition(".")[0] for name in model.new_weights}
    return heads + sorted(name for name in new if name.partition(".")[0] not in heads)


def _bring(model: nn.Module, heads: list[str], stored: Any) -> None:
    """Their values into memory: peft trains copies of them."""
    for head in heads:
        part = model.get_submodule(head)
        for name in materialise(part, lambda p: torch.empty(p.shape, dtype=p.dtype)):
            stored.read(f"{head}.{name}", 0, part.get_parameter(name).detach().view(-1))


def _draw(layer: Any) -> None:
    """A and B of one layer, in memory: the base may be on meta, or fake."""
    dtype = layer.get_base_layer().weight.dtype
    for part in (layer.lora_A, layer.lora_B):
        materialise(part, lambda p: torch.empty(p.shape, dtype=dtype))
    layer.reset_lora_parameters(NAME, True)


def file_names(model: Any) -> dict[str, str]:
    """Key in an adapter's file -> name of the trained parameter of `model` that it holds."""
    from peft import get_peft_model_state_dict

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    # peft is asked which name becomes which key: each parameter is stood for by its number
    marks = {name: torch.tensor(number) for number, name in enumerate(names)}
    found = get_peft_model_state_dict(model, marks, NAME, save_embedding_layers=False)
    keys = {PREFIX + key: names[int(mark)] for key, mark in found.items()}
    assert len(keys) == len(names), "every trained parameter has a place in the file"
    return keys


def save(model: Any, values: Mapping[str, Tensor], folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, which PeftModel.from_pretrained reads.
    values: trained parameter's name -> whole tensor on the CPU."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: values[name].contiguous() for key, name in file_names(model).items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = model.peft_config[NAME]
    # True in the file, as peft's own save_pretrained has it; here they go on training
    trains, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = trains


def read(model: Any, folder: Path) -> dict[str, Tensor]:
    """Trained parameter's name -> whole tensor on the CPU, as save() wrote them."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import load_file

    found = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    return {name: found[key] for key, name in file_names(model).items()}


def merged(base: nn.Module, folder: Path) -> Any:
    """`base`, which has no adapters, with those of `folder` added to its weights, in place. Through
    plain peft, as a user would."""
    peft = library()
    return peft.PeftModel.from_pretrained(base, folder).merge_and_unload(safe_merge=True)

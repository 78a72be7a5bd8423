"""Writes the trained model in Hugging Face format: full weights, safetensors, ties once, reloads
with from_pretrained.

Every rank writes the bytes it holds into the same files, so that nothing is gathered and a model
of any size is exported with a few MiB of memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tram_ds.checkpoint.export_layout import Layout, file_names, laid_out
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards, Span
from tram_ds.models import stored
from tram_ds.runtime import files, run_folder, shared_folder
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.run_layout import partial


def export(
    engine: Engine,
    folder: Path,
    peers: Peers,
    companion: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    weights: Shards | None = None,
    beat: Callable[[str], None] = lambda _: None,
) -> None:
    """`folder` holds config, theta (or `weights` instead, in the layout of params()) and
    `companion` (tokenizer or image processor); replaced as a whole, or left as it was with
    CheckpointError on all ranks. Collective.

    Where not all ranks see the folder, rank 0 is sent one tensor at a time, and where transformers
    merges or splits tensors of this model (or saves adapters alone) it holds the whole of it.
    """
    assert not engine.perturbed, "only theta is exported"
    doing, incomplete = f"writing {folder}", partial(folder)
    tensors = _tensors(engine.module, dtype)
    names = file_names(engine.module, tensors)
    try:
        if names is None:
            state = full_state(engine, weights)
            peers.first(doing, lambda: _save_whole(engine.module, state, incomplete, dtype))
        else:
            layout = laid_out(tensors, names, max_shard_size)
            peers.first(doing, lambda: _begin(engine.module, layout, incomplete, dtype))
            # found by looking, not by the world size: nodes may each have a folder of this name
            shared = not shared_folder.unshared(incomplete, peers, shared_folder.PATIENCE)
            write = _write_own if shared else _write_through_rank_0
            held = _held(engine, weights)
            peers.every(doing, lambda: write(engine, held, layout, incomplete, beat))
        peers.first(doing, lambda: _conclude(folder, companion))
    except CheckpointError:
        if peers.rank == 0:
            with suppress(OSError):  # its room is needed to try again; the next export retries it
                run_folder.discard_export(incomplete)
        raise


def _tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is exported, by name, as meta tensors; tied parameters once."""
    found = {
        name: torch.empty(_shape(p), dtype=dtype, device="meta")
        for name, p in module.named_parameters()
    }
    return found | {
        name: torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
        for name, buffer in _buffers(module).items()
    }


def _begin(module: Any, layout: Layout, incomplete: Path, dtype: torch.dtype) -> None:
    run_folder.discard_export(incomplete)
    incomplete.mkdir(parents=True)
    layout.begin(incomplete)
    _describe(module, incomplete, dtype)


def _describe(module: Any, folder: Path, dtype: torch.dtype) -> None:
    """config.json and its like, as save_pretrained writes them; the dtype is that of the files."""
    # the live model's dtype and name stay as they are
    config = copy.deepcopy(module.config)
    config.dtype = str(dtype).removeprefix("torch.")
    # FSDP2 puts its own class in front (FSDPGPT2LMHeadModel), which transformers has not
    config.architectures = [type(module).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if module.can_generate():
        module.generation_config.save_pretrained(folder)


def _conclude(folder: Path, companion: Any) -> None:
    incomplete = partial(folder)
    if companion is not None:
        companion.save_pretrained(incomplete)
    run_folder.replace_export(incomplete, folder)


def _write_own(
    engine: Engine,
    held: list[tuple[Span, Tensor]],
    layout: Layout,
    folder: Path,
    beat: Callable[[str], None],
) -> None:
    """This rank's pieces, into files that other ranks write into beside it."""
    pieces: list[tuple[Span, Tensor]] = []
    if engine.writes:
        pieces += held
    if engine.rank == 0:
        pieces += [
            (Span(name, 0, buffer.numel(), tuple(buffer.shape)), buffer)
            for name, buffer in _buffers(engine.module).items()
        ]
    with ExitStack() as stack:
        streams: dict[str, Any] = {}
        for span, piece in pieces:
            place = layout.places.get(span.name)
            if place is None or not span.length:
                continue
            # r+: opened without truncating, because other ranks write into it at the same time
            if place.file not in streams:
                streams[place.file] = stack.enter_context(open(folder / place.file, "r+b"))
            beat(f"writing {span.name}")
            # place is None where save_pretrained leaves a key out (_keys_to_ignore_on_save)
            place.write(streams[place.file], span.start, piece)
    for name in streams:
        # by each writer: rank 0's own sync would not wait for another node's cache
        files.sync(folder / name)


def _write_through_rank_0(
    engine: Engine,
    held: list[tuple[Span, Tensor]],
    layout: Layout,
    folder: Path,
    beat: Callable[[str], None],
) -> None:
    """Collective: one sum per parameter, which rank 0 writes before the next."""
    refused: OSError | None = None
    # every rank, to the end, also after a failure: each whole parameter is a sum of all ranks
    whole = _wholes(engine, held)
    for name, tensor in itertools.chain(whole, _buffers(engine.module).items()):
        beat(f"writing {name}")
        if engine.rank == 0 and refused is None and (place := layout.places.get(name)):
            try:
                with open(folder / place.file, "r+b") as stream:
                    place.write(stream, 0, tensor)
            except OSError as error:  # the others still wait in the sums that follow
                refused = error
    if refused is not None:
        raise refused


def _save_whole(
    module: Any, state: Mapping[str, Tensor], incomplete: Path, dtype: torch.dtype
) -> None:
    run_folder.discard_export(incomplete)
    disable_progress_bar()
    rounded = {name: tensor.to(dtype) for name, tensor in state.items()}
    buffers = {name: buffer.detach().cpu() for name, buffer in _buffers(module).items()}
    module.save_pretrained(incomplete, state_dict={**rounded, **buffers})
    if isinstance(module, PreTrainedModel) and not getattr(module, "_hf_peft_config_loaded", False):
        _describe(module, incomplete, dtype)


def full_state(engine: Engine, shards: Shards | None = None) -> dict[str, Tensor]:
    """name -> whole parameter, fp32 on the CPU, on rank 0; {} elsewhere. Collective: one sum per
    parameter.

    shards: other weights in the layout of params(), such as an EMA; None means theta.
    """
    wholes = _wholes(engine, _held(engine, shards))
    return {name: tensor.cpu() for name, tensor in wholes if engine.rank == 0}


def trained_state(engine: Engine, shards: Shards | None = None) -> dict[str, Tensor]:
    """full_state of the parameters that train alone. Collective: one sum for each of these."""
    theta = engine.weights.masters() if shards is None else shards
    wholes = _wholes(engine, [*zip(theta.layout, theta, strict=True)], trained=True)
    return {name: tensor.cpu() for name, tensor in wholes if engine.rank == 0}


def _held(engine: Engine, shards: Shards | None = None) -> list[tuple[Span, Tensor]]:
    """This rank's pieces of all parameters, theta (or `shards` instead of it) first; no copies."""
    theta, frozen = engine.weights.masters() if shards is None else shards, engine.weights.frozen()
    return [*zip(theta.layout, theta, strict=True), *zip(frozen.layout, frozen, strict=True)]


def _wholes(
    engine: Engine, held: list[tuple[Span, Tensor]], trained: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole parameter in fp32 on the engine's device), one at a time. Collective: every rank
    goes through to the end. trained: of those that train alone."""
    pieces: dict[str, list[tuple[Span, Tensor]]] = {}
    for span, piece in held:
        pieces.setdefault(span.name, []).append((span, piece))
    for name, parameter in engine.module.named_parameters():
        if trained and not parameter.requires_grad:
            continue
        shape = _shape(parameter)
        # zeros: every element is one rank's, and the sum of the others' zero bits changes none
        full = torch.zeros(shape.numel(), dtype=torch.float32, device=engine.device)
        for span, piece in pieces.get(name, []):
            full[span.start : span.start + span.length] = piece.detach().reshape(-1)
        if engine.shard_group is not None:
            # as bits: a float sum with the others' zeros would lose the sign of -0.0
            dist.all_reduce(full.view(torch.int32), group=engine.shard_group)
        yield name, full.view(shape)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that belong to the state dict."""
    found = {}
    for prefix, m in module.named_modules():
        # not named_buffers: that has those which from_pretrained expects in no file
        for name in set(m._buffers) - m._non_persistent_buffers_set:
            if (buffer := m._buffers[name]) is not None:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return dict(sorted(found.items()))


def read_export(engine: Engine, folder: Path) -> Shards:
    """Weights of an export in the layout of params(). Each rank reads its own pieces; no
    collective."""
    kind: Any = next(
        c
        for c in type(engine.module).__mro__
        if hasattr(c, "from_pretrained") and "FSDP" not in c.__name__
    )
    options = {"config": copy.deepcopy(engine.module.config), "dtype": torch.float32}
    _, _, read = stored.read_pieces(kind, folder, **options)
    return stored.laid_out_as(engine.weights.masters(), read)

"""Which parameters are theta, and whether they can be moved and put back: checked at wrap(), and
again at every step in which they have changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from tram_ds.engines.shards import Shards, Span

KINDS = ("norm", "embedding", "matrix")  # of parameters; biases outside norms are none


def parameter_names(module: nn.Module) -> dict[nn.Parameter, str]:
    """Trainable parameters -> unsharded names, tied parameters once, in the module's order. The
    layout every engine uses."""
    return {p: name for name, p in module.named_parameters() if p.requires_grad}


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names of parameter_names() -> unsharded shapes, the same on every rank."""
    names = parameter_names(module)
    # ZeRO stage 3 leaves a parameter in shape (0,) between its passes; a DTensor's is whole
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for p, name in names.items()}


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face model: the members of its longest ModuleList of one
    class."""
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and len({type(b) for b in m}) == 1
    ]
    return list(max(lists, key=len, default=[]))


def vocabulary_units(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output head of a Hugging Face model, each where no other module
    has its parameters: what a vocabulary is in, to be gathered apart from the rest."""
    # with duplicates, or a tied weight would show one owner alone
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        part
        for name, kind in (
            ("get_input_embeddings", nn.Embedding),
            ("get_output_embeddings", nn.Linear),
        )
        if type(part := _part(model, name)) is kind
        and all(owners[id(p)] == 1 for p in part.parameters())
    ]


def _part(model: nn.Module, getter: str) -> Any:
    """None where the model has none, or does not know."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def frozen(
    module: nn.Module, held: Callable[[str, nn.Parameter], tuple[Span, Tensor] | None], rank: int
) -> Shards:
    """Of the parameters that are not trained. held: this rank's flat piece of one; None where every
    rank has it whole: rank 0's counts, and the others' is empty."""
    pieces: list[tuple[Span, Tensor]] = []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            whole = Span(name, 0, 0 if rank else p.numel(), tuple(p.shape))
            pieces.append(held(name, p) or (whole, p.detach().reshape(-1)[: whole.length]))
    return Shards((tensor for _, tensor in pieces), tuple(span for span, _ in pieces))


def kinds_of(module: nn.Module) -> dict[str, str]:
    """Parameter name -> one of KINDS, for LayerNorm, RMSNorm and their like, for embeddings and for
    what else has two dimensions or more (before it was sharded)."""
    found: dict[str, str] = {}
    for name, part in module.named_modules():
        for own, p in part.named_parameters(prefix=name, recurse=False):
            # by name: transformers' LlamaRMSNorm and its like share no class but nn.Module
            if "Norm" in type(part).__name__:
                found[own] = "norm"
            elif "Embedding" in type(part).__name__:
                found[own] = "embedding"
            elif len(getattr(p, "ds_shape", p.shape)) > 1:
                found.setdefault(own, "matrix")
    return found


def signature(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Equal as long as theta is the same tensors and the optimizer holds the same: what a step
    compares to see a layer unfrozen, a head replaced, an adapter switched."""
    # by id, and by what p.data = ... or module.to() changes under the same id
    theta = [
        (name, id(p), p.dtype, p.device, p.shape, p.stride())
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return (*theta, *held)


def refuse_parameters(names: Mapping[nn.Parameter, str]) -> None:
    """ValueError where theta is empty or has a parameter that no ascent step fits."""
    if not names:
        raise ValueError("the model has no trainable parameter: set requires_grad_(True) on some")
    for parameter, name in names.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name} has no shape yet: run one forward pass, then wrap")
        if parameter.dtype in (torch.bfloat16, torch.float16):
            # an ascent step smaller than bf16's spacing would vanish in it
            raise ValueError(
                f"parameter {name} is {parameter.dtype}: most of a perturbation is lost in "
                "half-precision weights. Load the model in float32 and set model.dtype: bfloat16 "
                "for a bf16 working copy over fp32 masters"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name} is {parameter.dtype}: only float32 and float64 are trained. "
                "Freeze it (requires_grad_(False)), or keep a complex one as two real ones "
                "(torch.view_as_real)"
            )
        if parameter.device.type == "meta":
            raise ValueError(f"parameter {name} is on the meta device: load the model first")
    devices = {p.device for p in names}
    if len(devices) > 1:
        raise ValueError(
            f"the parameters lie on {', '.join(sorted(map(str, devices)))}: put the model on one "
            "device, or shard it with fully_shard or DeepSpeed"
        )


def refuse_memory(names: Mapping[nn.Parameter, str]) -> None:
    """ValueError for parameters that are views with gaps, or over each other's memory: moving one
    would overwrite its neighbour. Of replicated weights; the sharded ones own theirs."""
    taken: list[tuple[int, int, str]] = []
    for parameter, name in names.items():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"parameter {name} is a DTensor outside FSDP2 (tensor parallel?): only fully_shard "
                "over dimension 0 is supported"
            )
        if not dense(parameter):
            raise ValueError(
                f"parameter {name} is a strided view of a larger tensor: give it memory of its "
                f"own, nn.Parameter({name.rpartition('.')[2]}.detach().clone("
                "memory_format=torch.contiguous_format))"
            )
        if parameter._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
            raise ValueError(
                f"parameter {name} has a post-accumulate-grad hook (an optimizer step inside "
                "backward?), which would act on the gradient of the ascent as well: remove it"
            )
        if parameter.numel() and not isinstance(parameter, FakeTensor):  # these have no address
            start = parameter.data_ptr()
            taken.append((start, start + parameter.numel() * parameter.element_size(), name))
    taken.sort()
    for (_, end, one), (start, _, other) in pairwise(taken):
        if start < end:
            raise ValueError(
                f"parameters {one} and {other} share memory without being the same parameter: tie "
                f"them by assigning one to the other (module.{other} = module.{one})"
            )


def dense(tensor: Tensor) -> bool:
    """Whether its elements fill a contiguous stretch of memory, in any order of dimensions."""
    if not tensor.numel():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:  # a dimension of one element may have any stride
            if stride != expected:
                return False
            expected *= size
    return True


def refuse_optimizer_of_others(
    held: Iterable[Any], names: Mapping[Any, str], known: Sequence[Any] = ()
) -> None:
    """ValueError where the optimizer does not hold theta, all of it and nothing else that trains.

    held: the optimizer's parameters. known: those that were theta before, such as a head since
    replaced: nothing reaches them any more, and the optimizer passes them over.
    """
    groups = list(held)
    there, before = {id(p) for p in groups}, {id(p) for p in known}
    missing = [name for p, name in names.items() if id(p) not in there]
    mine = {id(p) for p in names}
    if len(missing) == len(names):
        raise ValueError(
            "the optimizer holds none of the model's trainable parameters: build it over "
            "model.parameters(), after moving, sharding or replacing them"
        )
    if missing:
        raise ValueError(
            f"the optimizer does not hold {missing[0]} ({len(missing)} of {len(names)} trainable "
            "parameters are missing): freeze them (requires_grad_(False)), or give them to it "
            "(optimizer.add_param_group, with lr=0.0 to climb by them and never descend)"
        )
    # a frozen one does no harm: it gets no gradient, and torch's optimizers pass it over
    others = [p for p in groups if id(p) not in mine | before and getattr(p, "requires_grad", True)]
    if others:
        raise ValueError(
            f"the optimizer also holds {len(others)} trainable parameters that are not the "
            f"model's, one of shape {tuple(others[0].shape)}: wrap a module that has them all "
            "(nn.ModuleList), or give them an optimizer of their own"
        )
    if len(groups) != len(there):
        raise ValueError("the optimizer holds a parameter twice: it would be stepped twice")

"""A recipe planned for a number of GPUs: memory, traffic and FLOPs of every algorithm, and what to
change if it is too big."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tram_ds.algorithms.bound import bind
from tram_ds.algorithms.table import ALGORITHMS, AlgorithmSection
from tram_ds.engines import choose as engines
from tram_ds.planning import outline, sizes
from tram_ds.planning.cost import Cost, cost
from tram_ds.planning.host import Host, host
from tram_ds.planning.memory import Memory, peak
from tram_ds.planning.setup import RunSetup, setup_of
from tram_ds.recipe.engine_config import engine_config
from tram_ds.recipe.recipe import Recipe, accumulation
from tram_ds.runtime.ranks import Job

# share of a GPU's memory for tensors: the rest is the CUDA context, NCCL's buffers and
# fragmentation
USABLE = 0.92


@dataclass(frozen=True)
class Plan:
    """One algorithm on one number of GPUs."""

    algorithm: str
    setup: RunSetup
    size: sizes.ModelSize
    memory: Memory
    cost: Cost
    host: Host

    def fits(self, bytes_per_gpu: float) -> bool:
        """Whether the peak leaves room for what no tensor holds (see USABLE)."""
        return self.memory.total <= USABLE * bytes_per_gpu


def plan(recipe: Recipe, world: int, name: str | None = None) -> Plan:
    """The recipe on `world` GPUs, with algorithm `name` in place of its own if given, at that row's
    defaults.

    RecipeError where the batch cannot be split over so many.
    """
    own = name is None or name == recipe.algorithm.name
    section = recipe.algorithm if own else AlgorithmSection(name=str(name))
    row = bind(section)
    setup = setup_for(recipe, world)
    size = sizes.size(recipe, autocast=setup.engine == "replicated")
    beside = host(setup, size, row, drawn=recipe.model.path is None)
    return Plan(section.name, setup, size, peak(setup, size, row), cost(setup, size, row), beside)


def setup_for(recipe: Recipe, world: int) -> RunSetup:
    """The engine of a recipe on `world` GPUs; `auto` as launched by torchrun. RecipeError where the
    batch does not divide."""
    # a device's name asks no driver: there need be no GPU here
    name = engines.choose(recipe.engine.name, Job(0, 0, world, "torchrun", torch.device("cuda", 0)))
    optimizer = recipe.optimizer
    return setup_of(
        name,
        engine_config(recipe.engine.model_copy(update={"name": name})),
        world=world,
        half=recipe.model.dtype == "bfloat16",
        kept=int(optimizer.momentum > 0) if optimizer.name == "sgd" else 2,
        micros=accumulation(recipe, world),
        checkpointing=recipe.model.activation_checkpointing,
        average=recipe.eval.weights == "ema",
        background=recipe.checkpoint.asynchronous,
    )


def every_algorithm(recipe: Recipe, world: int) -> list[Plan]:
    """The rows of ALGORITHMS; the recipe's own with its options, the others at their defaults."""
    return [plan(recipe, world, name) for name in ALGORITHMS]


def rank_bytes(recipe: Recipe, world: int) -> int:
    """Bytes one GPU of `world` needs apart from activations and logits."""
    return plan(recipe, world).memory.states


def changes(recipe: Recipe, world: int) -> Iterator[tuple[str, Recipe]]:
    """(override, the recipe with it), cheapest first: what costs no accuracy and little time before
    what costs more."""
    train, model = recipe.train, recipe.model
    for micro in (m for m in _halves(train.micro_batch) if train.global_batch % (m * world) == 0):
        yield f"train.micro_batch={micro}", _with(recipe, train={"micro_batch": micro})
    if not model.activation_checkpointing:
        yield (
            "model.activation_checkpointing=true",
            _with(recipe, model={"activation_checkpointing": True}),
        )
    if model.dtype == "float32":
        yield "model.dtype=bfloat16", _with(recipe, model={"dtype": "bfloat16"})
    # no sharded engine has a gradient of one rank
    if recipe.algorithm.perturbation_scope == "rank":
        return
    zero = recipe.engine.name == "zero"
    shard = (
        {"name": "zero", "config": "zero3.json"}
        if zero
        else {"name": "fsdp2", "config": "shard.yaml"}
    )
    off = {**shard, "config": "zero3_offload.json" if zero else "offload.yaml"}
    for engine in (shard, off):
        if (recipe.engine.name, recipe.engine.config) != (engine["name"], engine["config"]):
            yield (
                f"engine={{name: {engine['name']}, config: {engine['config']}}}",
                _with(recipe, engine=engine),
            )


def advice(recipe: Recipe, world: int, bytes_per_gpu: float) -> str:
    """One line: the single cheapest key that makes it fit, else the shortest list in order of cost,
    else more GPUs."""
    for text, changed in changes(recipe, world):
        if plan(changed, world).fits(bytes_per_gpu):
            return f"cheapest change: {text}"
    current, taken = recipe, []
    while step := next(_lighter(current, world), None):
        text, current = step
        taken.append(text)
        if plan(current, world).fits(bytes_per_gpu):
            return f"cheapest changes together: {' '.join(taken)}"
    more = [w for w in _doubles(world) if recipe.train.global_batch % w == 0]
    for gpus in more:
        if plan(_with(recipe, train={"micro_batch": 1}), gpus).fits(bytes_per_gpu):
            return f"more GPUs: {gpus}, with train.micro_batch=1"
    return "no key of the recipe is enough: a smaller model, or a larger global batch on more GPUs"


def _lighter(recipe: Recipe, world: int) -> Iterator[tuple[str, Recipe]]:
    """The changes that take memory away, so that a list of them ends."""
    now = plan(recipe, world).memory.total
    return (
        (text, changed)
        for text, changed in changes(recipe, world)
        if plan(changed, world).memory.total < now
    )


def _with(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    return recipe.model_copy(
        update={k: getattr(recipe, k).model_copy(update=v) for k, v in sections.items()}
    )


def _halves(n: int) -> Iterator[int]:
    while n > 1:
        n //= 2
        yield n


def _doubles(n: int) -> Sequence[int]:
    return [n * 2**k for k in range(1, 13) if n * 2**k <= 4096]


def published(name: str, world: int, row: str, rows_per_gpu: int = 4, seq_len: int = 1024) -> Plan:
    """The plan of `published_recipe`."""
    return plan(published_recipe(name, world, row, rows_per_gpu, seq_len), world)


def published_recipe(
    name: str, world: int, row: str, rows_per_gpu: int = 4, seq_len: int = 1024
) -> Recipe:
    """A model of outline.CONFIGS as the documentation's tables have it: FSDP2, bf16, Adam,
    activation checkpointing."""
    return Recipe.model_validate(
        {
            "name": name,
            "task": {"name": "language_modeling", "data": "generated", "seq_len": seq_len},
            "model": {
                "init": outline.CONFIGS[name],
                "dtype": "bfloat16",
                "activation_checkpointing": True,
            },
            "algorithm": row,
            "optimizer": {"name": "adam", "lr": 1e-5},
            "engine": {"name": "fsdp2", "config": "shard.yaml"},
            "train": {
                "steps": 1,
                "global_batch": rows_per_gpu * world,
                "micro_batch": rows_per_gpu,
            },
        }
    )

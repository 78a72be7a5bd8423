"""Scores models that exist: exports, hub ids and the pre-trained model, on any domains of a
recipe's task.

Every rank scores its share of the rows, by the whole model or by one that is sharded over all
ranks; the numbers do not depend on which, nor on how many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from tram_ds.data.alike import read_alike
from tram_ds.engines import choose as engines
from tram_ds.evaluation import row_scores
from tram_ds.evaluation.candidates import Candidate
from tram_ds.evaluation.per_token import tokens_of
from tram_ds.evaluation.row_scores import RowScores
from tram_ds.evaluation.score import evaluate, zero_shot_average
from tram_ds.evaluation.weights import fill, towards
from tram_ds.models.pretrained import load_model, load_stored
from tram_ds.recipe.model_section import ModelSection
from tram_ds.recipe.recipe import Recipe, to_dict
from tram_ds.recipe.same_everywhere import refuse_other_recipes
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.paths import expanded
from tram_ds.runtime.ranks import Job, joined
from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_layout import ADAPTER
from tram_ds.tasks import choose as tasks

Split = Literal["validation", "test"]
Scores = dict[str, dict[str, float]]  # domain -> metric -> value


@dataclass(frozen=True)
class Asked:
    """What is scored, and where. domains: None means the recipe's. sharded: no rank holds a whole
    model."""

    recipe: Recipe
    domains: Sequence[str] | None
    split: Split
    job: Job
    sharded: bool = False


def score_all(
    recipe: Recipe,
    chosen: Sequence[Candidate],
    domains: Sequence[str] | None,
    split: Split,
    job: Job,
    sharded: bool = False,
) -> tuple[dict[str, Any], row_scores.Kept]:
    """(the report: scores of every model on every domain, and their zero-shot average; the scores
    of every row, by the model's place in the report). Collective over the job.

    domains, sharded: see Asked. Data, tokenisers and configs of all models are checked first.
    """
    asked = Asked(recipe, domains, split, job, sharded)
    _refuse(asked, chosen)
    with joined(job, "fsdp2" if sharded else "replicated"):
        refuse_other_recipes(recipe, job.world_size)
        built = _tasks(asked, chosen)
        kept: row_scores.Kept = {str(place): {} for place in range(len(chosen))}
        models = [
            _entry(asked, candidate, task, rows)
            for candidate, task, rows in zip(chosen, built, kept.values(), strict=True)
        ]
        report = {
            "recipe": recipe.name,
            "task": recipe.task.name,
            "data": recipe.task.data,
            "split": split,
            "asked": redact({key: to_dict(recipe)[key] for key in ("task", "model")}),
            "metric": built[0].metric,
            "train_domains": list(built[0].train_domains),
            "models": models,
        }
        return report, kept


def _refuse(asked: Asked, chosen: Sequence[Candidate]) -> None:
    if not chosen:
        raise DataError("no model to evaluate: name one with --model, or leave --no-pretrained out")
    if asked.sharded and any(c.checkpoint or c.interpolation is not None for c in chosen):
        raise DataError(
            "--sharded: a checkpoint, or a point between two models, is made whole on every rank: "
            "name an export or a hub id, or leave --sharded out"
        )
    if asked.recipe.eval.weights == "ema" and any(c.checkpoint for c in chosen):
        raise DataError(
            "eval.weights = ema: of a checkpoint the last weights are scored: name the run, whose "
            "export has the average, or set eval.weights=last"
        )


def _tasks(asked: Asked, chosen: Sequence[Candidate]) -> list[Any]:
    """Each candidate's own, with its tokenizer, over data that all ranks read alike. Collective."""
    return read_alike(
        lambda: [tasks.build(_scored(_evaluating(asked), c), training=False) for c in chosen],
        lambda found: {
            **{
                f"{asked.split} rows of {domain}": len(rows)
                for task in found
                for domain, rows in task.eval_sets(asked.split).items()
            },
            "content": found[0].data_digest(),  # of one recipe's data, whatever the model
        },
        asked.job.world_size,
        f"task.data {asked.recipe.task.data}",
    )


def _entry(
    asked: Asked, candidate: Candidate, task: Any, kept: dict[str, RowScores]
) -> dict[str, Any]:
    """What the report says of one model. kept: gets the scores of its rows. Collective."""
    model, fresh = _model(asked, candidate, task)
    scores = _score(asked, candidate, model, task, kept)
    average = zero_shot_average(scores, task.train_domains, task.metric)
    own = asked.recipe.model.path
    untrained = candidate.pretrained and own is None
    path = candidate.path or candidate.checkpoint or own
    return {
        "name": "untrained" if untrained else candidate.name,
        "path": None if path is None else str(path),
        "scores": scores,
        "tokens": tokens_of(task),
        "untrained_head": fresh,
        "interpolation": candidate.interpolation,
        "zero_shot_average": None if math.isnan(average) else average,
    }


def _model(asked: Asked, candidate: Candidate, task: Any) -> tuple[Any, bool]:
    """(the candidate on the host, or with its weights still in their files; whether its head was
    never trained)."""
    model = task.model(load_stored if asked.sharded else load_model)
    trained = asked.recipe.model.path is not None
    fresh = candidate.pretrained and bool(model.new_weights) and trained
    if candidate.checkpoint is not None:
        fill(model, candidate.checkpoint)
    if model.new_weights and candidate.path is not None:
        raise DataError(
            f"'{candidate.path}' lacks {len(model.new_weights)} weights of {type(model).__name__} "
            f"({', '.join(model.new_weights[:3])}): it was not trained for this task; only the "
            "pre-trained row may lack them"
        )
    if candidate.interpolation is not None:
        bare = _scored(_evaluating(asked), Candidate("own"))
        own = tasks.build(bare, training=False).model()
        towards(own, model, candidate.interpolation, candidate.path or str(candidate.checkpoint))
        fresh = bool(own.new_weights) and candidate.interpolation == 0.0
    return model, fresh


def _score(
    asked: Asked, candidate: Candidate, model: Any, task: Any, kept: dict[str, RowScores]
) -> Scores:
    """Of `model`, which is moved to the job's device. Collective."""
    recipe, job, domains = asked.recipe, asked.job, asked.domains
    sets = task.eval_sets(asked.split)
    rows = {name: r for name, r in sets.items() if domains is None or name in domains}
    if not rows:
        raise DataError(
            f"none of the domains chosen has a {asked.split} split: "
            f"{', '.join(domains or task.eval_domains)}"
        )
    batch = recipe.eval.batch or recipe.train.micro_batch
    half = recipe.model.dtype == "bfloat16"
    # the weights stay fp32, as a run's masters; bf16 is the forward's alone
    precision = torch.autocast(job.device.type, dtype=torch.bfloat16) if half else nullcontext()
    with precision, _bar(candidate.name, rows, batch, job) as bar:
        return evaluate(
            _sharded(model, job) if asked.sharded else model.to(job.device),
            task,
            rows,
            batch,
            job.rank,
            job.world_size,
            job.device,
            _data_sum(job),
            _told(bar),
            kept.__setitem__,
        )


def _sharded(model: Any, job: Job) -> Any:
    """The model over all ranks, fp32, each with its own pieces alone, which it reads from the files
    where they still are there. Collective."""
    stored = getattr(model, "stored", None)
    settings = engines.Settings(
        job=job,
        optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=0.0),  # never steps
        config={},
        dtype=torch.float32,  # as the whole model has it: autocast makes the working copy
        micro_batch=1,
        accumulation=1,
        fill=stored.read if stored else None,
    )
    engine = engines.build("fsdp2", model, settings)
    if stored is not None:
        stored.close()
    return engine.model


def _evaluating(asked: Asked) -> Recipe:
    """The recipe that opens what is scored, and nothing else."""
    recipe, domains = asked.recipe, asked.domains
    task = (
        recipe.task if domains is None else recipe.task.model_copy(update={"eval": list(domains)})
    )
    scored = recipe.eval.model_copy(update={"splits": [asked.split], "every_steps": None})
    return recipe.model_copy(update={"task": task, "eval": scored})


def _scored(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe with the candidate's model. Only a checkpoint has adapters beside the weights: an
    export has them merged, and before training they change nothing."""
    model, path = recipe.model, candidate.path
    if path is not None:
        folder = Path(expanded(path))
        found = (folder / ADAPTER).is_dir() or (folder / "adapter_config.json").is_file()
        if found and not (folder / "config.json").is_file():
            raise DataError(
                f"{path} holds adapters alone: merge them into the model first, with "
                "`tram export RUN --merge --out FOLDER`"
            )
        model = ModelSection(path=path, dtype=model.dtype, attention=model.attention)
    elif candidate.checkpoint is None:
        model = model.model_copy(update={"lora": None})
    return recipe.model_copy(update={"model": model})


def _data_sum(job: Job) -> Callable[[Tensor], Tensor]:
    def over_ranks(x: Tensor) -> Tensor:
        # in place: evaluate's table is its own
        dist.all_reduce(x)
        return x

    return over_ranks if job.world_size > 1 else lambda x: x


def _bar(name: str, rows: Mapping[str, Sequence[Any]], batch: int, job: Job) -> tqdm[Any]:
    total = sum(math.ceil(math.ceil(len(r) / job.world_size) / batch) for r in rows.values())
    return tqdm(
        total=total,
        desc=name,
        unit="batch",
        disable=job.rank != 0,
        dynamic_ncols=True,
        mininterval=0.5,
    )


def _told(bar: tqdm[Any]) -> Callable[[str, int, int], None]:
    def progress(domain: str, _: int, __: int) -> None:
        bar.set_postfix_str(domain, refresh=False)
        bar.update()

    return progress

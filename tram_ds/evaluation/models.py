"""Scores models that exist: exports, hub ids and the pre-trained model, on any domains of a
recipe's task.

Every rank holds the whole model and scores its share of the rows; the numbers do not depend on how
many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from tram_ds.checkpoint import files as checkpoint_files
from tram_ds.checkpoint import tensors as checkpoint_tensors
from tram_ds.checkpoint.files import MANIFEST
from tram_ds.checkpoint.state import buffers
from tram_ds.checkpoint.tensors import Flat
from tram_ds.data.alike import read_alike
from tram_ds.data.m2d2 import ABBREVIATIONS, short_names
from tram_ds.engines.layout import parameter_names
from tram_ds.evaluation.score import evaluate, zero_shot_average
from tram_ds.recipe.recipe import Recipe
from tram_ds.recipe.sections import ModelSection
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.exits import CheckpointError
from tram_ds.runtime.paths import expanded, refuse_missing
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import Job, joined
from tram_ds.runtime.run_layout import ADAPTER, RunFolder
from tram_ds.tasks import choose as tasks

Split = Literal["validation", "test"]
Scores = dict[str, dict[str, float]]  # domain -> metric -> value


@dataclass(frozen=True)
class Candidate:
    """A model to score. path: an export; None is the recipe's own model. checkpoint: a folder of
    weights for that. interpolation: how far on the straight line from the recipe's own model to
    this one; None is this one."""

    name: str
    path: str | None = None
    checkpoint: Path | None = None
    interpolation: float | None = None

    @property
    def pretrained(self) -> bool:
        """Whether it is the recipe's own model, before any fine-tuning."""
        return self.path is None and self.checkpoint is None


def candidates(paths: Sequence[str], pretrained: bool) -> list[Candidate]:
    """The pre-trained model first, then each path: an export, a run folder (its export), a
    checkpoint or a hub id."""
    found = [Candidate("pre-trained")] if pretrained else []
    unique = len({Path(path).name for path in paths}) == len(paths)
    for given in paths:
        path = expanded(given, "--model")
        refuse_missing(given, "--model")
        folder = Path(path)
        name = folder.name if folder.is_dir() and unique else path
        if (folder / MANIFEST).is_file():
            found.append(Candidate(name, checkpoint=folder))
        else:
            export = RunFolder(folder).export
            found.append(Candidate(name, str(export) if export.is_dir() else path))
    return found


def interpolated(chosen: Sequence[Candidate], text: str) -> list[Candidate]:
    """Each candidate but the recipe's own at each of the points in `text`, numbers from 0 to 1 with
    commas: weights (1 - a) theta_0 + a theta (WiSE-FT, Wortsman et al. 2022). ValueError."""
    try:
        points = [float(word) for word in text.split(",")]
    except ValueError:
        points = [math.nan]
    if not all(0.0 <= a <= 1.0 for a in points):
        raise ValueError(
            f"--interpolate {text}: expected numbers from 0 (the pre-trained model) to 1 (the "
            "trained one), with commas"
        )
    if all(c.pretrained for c in chosen):
        raise ValueError("--interpolate: name the trained model with --model")
    return [
        one
        for c in chosen
        for one in (
            [c]
            if c.pretrained
            else [replace(c, name=f"{c.name} at {a:g}", interpolation=a) for a in points]
        )
    ]


def score_all(
    recipe: Recipe,
    chosen: Sequence[Candidate],
    domains: Sequence[str] | None,
    split: Split,
    job: Job,
) -> dict[str, Any]:
    """The report: scores of every model on every domain, and their zero-shot average. Collective
    over the job.

    domains: those scored; None means the recipe's. Data, tokenisers and configs of all models are
    checked first.
    """
    if not chosen:
        raise DataError("no model to evaluate: name one with --model, or leave --no-pretrained out")
    if recipe.eval.weights == "ema" and any(c.checkpoint for c in chosen):
        raise DataError(
            "eval.weights = ema: of a checkpoint the last weights are scored: name the run, whose "
            "export has the average, or set eval.weights=last"
        )
    with joined(job, "replicated"):
        built = read_alike(
            lambda: [
                tasks.build(_scored(_evaluating(recipe, domains, split), c), training=False)
                for c in chosen
            ],
            lambda found: {
                **{
                    f"{split} rows of {domain}": len(rows)
                    for task in found
                    for domain, rows in task.eval_sets(split).items()
                },
                "content": found[0].data_digest(),  # of one recipe's data, whatever the model
            },
            job.world_size,
            f"task.data {recipe.task.data}",
        )
        report: dict[str, Any] = {
            "recipe": recipe.name,
            "task": recipe.task.name,
            "data": recipe.task.data,
            "split": split,
            "metric": built[0].metric,
            "train_domains": list(built[0].train_domains),
            "models": [],
        }
        for candidate, task in zip(chosen, built, strict=True):
            scores, fresh = _score(recipe, candidate, task, domains, split, job)
            average = zero_shot_average(scores, task.train_domains, task.metric)
            name = (
                "untrained"
                if candidate.pretrained and recipe.model.path is None
                else candidate.name
            )
            path = candidate.path or candidate.checkpoint or recipe.model.path
            entry = {"name": name, "path": None if path is None else str(path), "scores": scores}
            entry |= {
                "untrained_head": fresh,
                "interpolation": candidate.interpolation,
                "zero_shot_average": None if math.isnan(average) else average,
            }
            report["models"].append(entry)
    return report


def table(report: Mapping[str, Any]) -> str:
    """The report's main metric as text: a row per model, a column per domain (M2D2's with the
    paper's names)."""
    metric = report["metric"]
    domains = list(report["models"][0]["scores"])
    names = short_names(domains)
    heads = [
        (names[name].upper() if name in ABBREVIATIONS and names[name] != name else name)
        + "*" * (name in report["train_domains"])
        for name in domains
    ]
    rows = [["model", *heads, "zero-shot"]]
    for entry in report["models"]:
        values = [entry["scores"][domain][metric] for domain in domains] + [
            entry["zero_shot_average"]
        ]
        note = " (untrained head)" if entry["untrained_head"] else ""
        rows.append([entry["name"] + note, *(_shown(value, metric) for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            t.ljust(w) if not i else t.rjust(w)
            for i, (t, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    title = f"{metric} on {report['split']} of {report['data']} (* trained on)"
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _score(
    recipe: Recipe,
    candidate: Candidate,
    task: Any,
    domains: Sequence[str] | None,
    split: Split,
    job: Job,
) -> tuple[Scores, bool]:
    """(scores, whether the head was never trained)."""
    model = task.model()
    fresh = candidate.pretrained and bool(model.new_weights) and recipe.model.path is not None
    if candidate.checkpoint is not None:
        fill(model, candidate.checkpoint)
    if model.new_weights and candidate.path is not None:
        raise DataError(
            f"'{candidate.path}' lacks {len(model.new_weights)} weights of {type(model).__name__} "
            f"({', '.join(model.new_weights[:3])}): it was not trained for this task; only the "
            "pre-trained row may lack them"
        )
    if candidate.interpolation is not None:
        bare = _scored(_evaluating(recipe, domains, split), Candidate("own"))
        own = tasks.build(bare, training=False).model()
        towards(own, model, candidate.interpolation, candidate.path or str(candidate.checkpoint))
        fresh = bool(own.new_weights) and candidate.interpolation == 0.0
    rows = {
        name: r for name, r in task.eval_sets(split).items() if domains is None or name in domains
    }
    if not rows:
        raise DataError(
            f"none of the domains chosen has a {split} split: "
            f"{', '.join(domains or task.eval_domains)}"
        )
    batch = recipe.eval.batch or recipe.train.micro_batch
    half = recipe.model.dtype == "bfloat16"
    precision = torch.autocast(job.device.type, dtype=torch.bfloat16) if half else nullcontext()
    with precision, _bar(candidate.name, rows, batch, job) as bar:
        model = model.to(job.device)
        scores = evaluate(
            model,
            task,
            rows,
            batch,
            job.rank,
            job.world_size,
            job.device,
            _data_sum(job),
            _told(bar),
        )
    return scores, fresh


def fill(model: nn.Module, folder: Path) -> None:
    """The weights and buffers of a training checkpoint, in place. CheckpointError if it is damaged
    or of another model."""
    manifest = checkpoint_files.verify(folder)
    parameters = {name: p for p, name in parameter_names(model).items()}
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    saved = manifest["parameters"]
    differing = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
    if differing:
        raise CheckpointError(
            f"{folder} is of another model than the recipe's: {', '.join(differing[:5])} differ"
        )
    tensors = {f"theta/{name}": Flat.of(p.detach(), 0, p.numel()) for name, p in parameters.items()}
    tensors |= {f"buffer/{name}": Flat.of(b, 0, b.numel()) for name, b in buffers(model)}
    checkpoint_tensors.read(tensors, folder, Peers(1))


def towards(own: nn.Module, model: nn.Module, a: float, name: str) -> None:
    """`model` := (1 - a) own + a model, in place: every parameter once and every persistent buffer
    of real numbers; at 0 and 1 bit for bit one of the two. DataError where they differ in more than
    values.

    Weights that the pre-trained model lacks, such as a new head, are those that a run of the recipe
    starts from.
    """
    theirs, ours = (
        {**{n: p for p, n in parameter_names(m).items()}, **dict(buffers(m))} for m in (own, model)
    )
    differing = sorted(
        n
        for n in {*theirs, *ours}
        if n not in theirs or n not in ours or theirs[n].shape != ours[n].shape
    )
    if differing:
        raise DataError(
            f"'{name}' cannot be interpolated with the recipe's own model: "
            f"{', '.join(differing[:3])} differ in name or shape"
        )
    with torch.no_grad():
        for key, tensor in ours.items():
            start = theirs[key].to(tensor.dtype)
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(start, tensor, a))
            elif a == 0.0:
                tensor.copy_(start)


def _evaluating(recipe: Recipe, domains: Sequence[str] | None, split: Split) -> Recipe:
    """The recipe that opens what is scored, and nothing else."""
    task = (
        recipe.task if domains is None else recipe.task.model_copy(update={"eval": list(domains)})
    )
    scored = recipe.eval.model_copy(update={"splits": [split], "every_steps": None})
    return recipe.model_copy(update={"task": task, "eval": scored})


def _scored(recipe: Recipe, candidate: Candidate) -> Recipe:
    """The recipe with the candidate's model. Only a checkpoint has adapters beside the weights: an
    export has them merged, and before training they change nothing."""
    model, path = recipe.model, candidate.path
    if path is not None:
        folder = Path(expanded(path))
        if (folder / ADAPTER).is_dir() and not (folder / "config.json").is_file():
            raise DataError(
                f"{path} holds adapters alone (model.lora.merge = false): merge them into the "
                "model first, with PeftModel.from_pretrained(...).merge_and_unload()"
            )
        model = ModelSection(path=path, dtype=model.dtype, attention=model.attention)
    elif candidate.checkpoint is None:
        model = model.model_copy(update={"lora": None})
    return recipe.model_copy(update={"model": model})


def _data_sum(job: Job) -> Callable[[Tensor], Tensor]:
    def over_ranks(x: Tensor) -> Tensor:
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


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:,.2f}"

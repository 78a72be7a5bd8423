"""Analyses of a run's exported weights, domain by domain, on the recipe's own engine:
analysis.json, figures and a table.

Everything runs in float32: a bf16 working copy would round a box of 1e-5 away. The model of the
recipe is built first, so that its own weights are there as the pre-trained ones; the export's
replace them in place.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from transformers.utils.logging import disable_progress_bar

from tram_ds.engines import choose as engines
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards
from tram_ds.models.pretrained import load_stored
from tram_ds.models.stored import laid_out_as, read_pieces
from tram_ds.recipe import file as recipe_file
from tram_ds.recipe.errors import explain
from tram_ds.recipe.loading import load
from tram_ds.recipe.recipe import Recipe
from tram_ds.recipe.same_everywhere import refuse_other_recipes
from tram_ds.recipe.sections import OptimizerSection, ScheduleSection
from tram_ds.runtime.checked import Section
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.ranks import Job, detect, joined, threads_per_rank
from tram_ds.runtime.run_layout import RunFolder
from tram_ds.runtime.wording import first_line, hint
from tram_ds.surface import cka, hessian, landscape, sharpness
from tram_ds.surface.analysis_report import WHAT, Report, opened, write
from tram_ds.surface.cka import Options as CkaOptions
from tram_ds.surface.effect import Options as EffectOptions
from tram_ds.surface.effect import recipes, run_rows, show_rows
from tram_ds.surface.hessian import Options as HessianOptions
from tram_ds.surface.inputs import exported, scored_rows
from tram_ds.surface.landscape import Options as LandscapeOptions
from tram_ds.surface.sharpness import Options as SharpnessOptions
from tram_ds.surface.subject import Subject, parameter_shapes
from tram_ds.training.build import build_engine


class Analyses(Section):
    """The settings of every analysis."""

    sharpness: SharpnessOptions = SharpnessOptions()
    """epsilon-sharpness."""
    cka: CkaOptions = CkaOptions()
    """Linear CKA against the pre-trained model."""
    landscape: LandscapeOptions = LandscapeOptions()
    """Loss along random directions."""
    hessian: HessianOptions = HessianOptions()
    """Largest Hessian eigenvalue."""
    effect: EffectOptions = EffectOptions()
    """What a step does, before a run."""


@dataclass(frozen=True)
class Request:
    """What to analyse. export: a folder; None is the run's. domains: None means the recipe's. rows:
    most of each; None, all."""

    what: Sequence[str]
    options: Analyses
    export: Path | None = None
    domains: Sequence[str] | None = None
    split: Literal["validation", "test"] = "validation"
    rows: int | None = None
    local_rank: int | None = None


def before_a_run(options: Namespace) -> None:
    """`--what effect` of launch/analyze.py's command line. Collective; ValueError names what is
    wrong with it."""
    for given in ("export", "domains", "rows", "sharpness"):
        if getattr(options, given) is not None:
            raise ValueError(f"--{given}: --what effect reads training rows only; leave it out")
    overrides, settings = split_overrides(options.overrides)
    rows = recipes(options, overrides, settings.effect)
    show_rows(rows[0], *run_rows(rows, settings.effect, options.local_rank))


def request(options: Namespace) -> tuple[Recipe, Request]:
    """(recipe, what to analyse) of launch/analyze.py's command line. ValueError names what is wrong
    with it."""
    if options.rows is not None and options.rows < 1:
        raise ValueError(f"--rows {options.rows}: at least 1 is needed")
    variant = [f"sharpness.variant={options.sharpness}"] if options.sharpness else []
    overrides, settings = split_overrides([*options.overrides, *variant])
    chosen = load(options.recipe, overrides, smoke=options.smoke)
    domains = options.domains.split(",") if options.domains else None
    what = names(options.what)
    return chosen, Request(
        what, settings, options.export, domains, options.split, options.rows, options.local_rank
    )


def split_overrides(words: Sequence[str]) -> tuple[list[str], Analyses]:
    """(those for the recipe, the analyses' settings): `sharpness.epsilon=1e-4` is an analysis's,
    `eval.batch=64` the recipe's."""
    known = Analyses.model_fields
    own = [word for word in words if word.partition("=")[0].partition(".")[0] in known]
    source = recipe_file.Source("command line", {})
    recipe_file.override(source, own)
    try:
        return [word for word in words if word not in own], Analyses.model_validate(source.data)
    except ValidationError as error:
        raise explain(error, Analyses, source) from None


def names(text: str) -> list[str]:
    """`sharpness,cka` as a list; ValueError for what is not an analysis of weights."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if "effect" in found:
        raise ValueError(
            "--what effect looks at a recipe before its run, the others at its weights: ask for "
            "it alone"
        )
    for name in found:
        if name not in WHAT:
            raise ValueError(
                f"--what {name}: no such analysis{hint(name, Analyses.model_fields)} (there are "
                f"{', '.join(Analyses.model_fields)})"
            )
    return found


def run(recipe: Recipe, request: Request) -> tuple[Job, Report]:
    """(this rank's place, the report), which rank 0 keeps in analysis.json beside the export. Every
    rank of the job calls it.

    Raises ValueError for the recipe, its data or the export, before any model is loaded where it
    can be known.
    """
    job = detect(request.local_rank)
    torch.set_num_threads(threads_per_rank(job))
    chosen = analysed(recipe, request)
    name = engines.choose(recipe.engine.name, job)
    with joined(job, name, timedelta(seconds=recipe.train.timeout)):
        refuse_other_recipes(recipe, job.world_size)
        export, folder = exported(recipe, request.export, job.world_size)
        task, wanted = scored_rows(chosen, request.domains, request.split, job.world_size)
        model = task.model(load_stored)
        kind = type(model)  # before an engine makes it something else
        engine = build_engine(chosen, name, model, job, 1, 1)
        # before the load, which writes the export's weights over them
        pretrained = engine.params(keep=True) if "cka" in request.what else None
        engine.load(weights(engine, kind, export), {}, 0)
        report = opened(folder, header(recipe, request, task, export))
        for domain, rows in wanted.items():
            subject = subject_of(engine, task, rows, chosen, request.rows)
            measure_all(subject, request, domain, pretrained, task.classification, report, folder)
        close = getattr(engine.model, "destroy", None)
        if close is not None:
            close()
    lines = {
        d: found["landscape"] for d, found in report["domains"].items() if "landscape" in found
    }
    # outside joined(): no other rank waits while rank 0 draws
    if job.rank == 0 and "landscape" in request.what:
        landscape.plot(
            lines,
            RunFolder(folder).analysis,
            f"{report['recipe']}, {report['algorithm']}, seed {report['seed']}",
        )
    return job, report


def weights(engine: Engine, kind: Any, export: Path) -> Shards:
    """The export's weights in the layout of params(). Local: every rank reads its own pieces.

    kind: the model's class, which knows how names in files differ from names in the module.
    DataError for another model's.
    """
    disable_progress_bar()
    try:
        config = kind.config_class.from_pretrained(export)
        model, report, read = read_pieces(kind, export, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{export} cannot be read as a {kind.__name__}: {first_line(error)}"
        ) from error
    saved, shapes = dict(model.named_parameters()), parameter_shapes(engine)
    other = sorted(
        {
            *report["missing_keys"],
            *(n for n, shape in shapes.items() if n not in saved or saved[n].shape != shape),
        }
    )
    if other:
        raise DataError(
            f"{export} is of another model ({', '.join(other[:3])} differ): give the recipe it "
            "was trained with"
        )
    return laid_out_as(engine.params(), read)


def analysed(recipe: Recipe, request: Request) -> Recipe:
    """The recipe with what an analysis needs and nothing else: fp32, no optimizer state, the chosen
    domains and split."""
    task = (
        recipe.task
        if request.domains is None
        else recipe.task.model_copy(update={"eval": list(request.domains)})
    )
    flash = recipe.model.attention == "flash_attention_2"  # it has no float32 kernels
    # adapters are merged in an export: the surface is that of the whole model
    model = recipe.model.model_copy(
        update={"dtype": "float32", "lora": None, **({"attention": "sdpa"} if flash else {})}
    )
    scored = recipe.eval.model_copy(update={"splits": [request.split], "every_steps": None})
    plain = {"optimizer": OptimizerSection(name="sgd", lr=0.0), "schedule": ScheduleSection()}
    return recipe.model_copy(update={"task": task, "model": model, "eval": scored, **plain})


def subject_of(
    engine: Engine, task: Any, rows: Sequence[Any], recipe: Recipe, most: int | None
) -> Subject:
    """One domain's rows on the engine."""

    def batch(numbers: Sequence[int]) -> dict[str, Any]:
        return {
            key: value.to(engine.device)
            for key, value in task.collate([rows[i] for i in numbers]).items()
        }

    micro_batch = recipe.eval.batch or recipe.train.micro_batch
    return Subject(engine, task.forward, batch, len(rows), micro_batch, recipe.train.seed).first(
        most
    )


def measure_all(
    subject: Subject,
    request: Request,
    domain: str,
    pretrained: Shards | None,
    classification: bool,
    report: Report,
    folder: Path,
) -> None:
    """Adds one domain's results to the report and, on rank 0, to the file: an analysis that is
    stopped keeps what it has."""
    options = request.options
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "sharpness": lambda: sharpness.measure(subject, options.sharpness),
        "cka": lambda: (
            cka.measure(subject, pretrained, options.cka, classification)
            if pretrained is not None
            else {}
        ),
        "landscape": lambda: landscape.measure(subject, options.landscape),
        "hessian": lambda: hessian.measure(subject, options.hessian),
    }
    for name in request.what:
        started = time.monotonic()
        report["domains"].setdefault(domain, {})[name] = measures[name]()
        if subject.engine.rank == 0:
            write(report, folder)
            print(
                f"{domain}: {name} took {time.monotonic() - started:.1f} s",
                file=sys.stderr,
                flush=True,
            )


def header(recipe: Recipe, request: Request, task: Any, export: Path) -> Report:
    """What the results of one analysis.json have in common."""
    files = [
        [f.name, f.stat().st_size, f.stat().st_mtime_ns]
        for f in sorted(export.glob("*.safetensors"))
    ]
    about: Report = {
        "recipe": recipe.name,
        "algorithm": recipe.algorithm.name,
        "seed": recipe.train.seed,
    }
    about |= {
        "task": recipe.task.name,
        "split": request.split,
        "export": str(export),
        "weights": files,
    }
    return about | {"train_domains": list(task.train_domains), "domains": {}}

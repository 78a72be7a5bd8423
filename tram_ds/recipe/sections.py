"""The sections of a recipe except `task`, `model` and `algorithm`: what each key means, its unit,
its default and the values it takes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tram_ds.runtime.checked import (
    AtLeast,
    NamedSection,
    NotNegative,
    Positive,
    Section,
    refusal,
)
from tram_ds.runtime.paths import Place, expanded_uri

Momentum = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[
    tuple[Momentum, Momentum],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class OptimizerSection(NamedSection):
    """The base optimizer, applied to the gradient the algorithm hands it."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    """sgd, adam (the paper's), or adamw (decoupled weight decay)."""
    lr: Annotated[float, Field(ge=0)]
    """Peak learning rate, reached after schedule.warmup_steps."""
    betas: Pair = (0.9, 0.99)
    """Decay rates of Adam's first and second moment, per step; the default is the paper's."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to Adam's denominator."""
    momentum: Momentum = 0.0
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay per step, as a factor of the learning rate (adamw) or added to the gradient
    (sgd, adam)."""
    decay_filter: Literal["matrices", "all"] = "matrices"
    """Which parameters decay: those with two or more dimensions, or all."""

    def unread(self) -> dict[str, str]:
        keys = ("betas", "eps") if self.name == "sgd" else ("momentum",)
        return {
            key: f"optimizer.name = {self.name} does not read optimizer.{key}; remove it"
            for key in keys
        }


class ScheduleSection(NamedSection):
    """The learning rate over the steps: linear warm-up from 0, then the named curve."""

    name: Literal["constant", "linear", "polynomial", "cosine"] = "constant"
    """Curve after the warm-up, from optimizer.lr down to end_lr at the last step (constant
    stays)."""
    warmup_steps: NotNegative = 0
    """Optimizer steps of linear warm-up."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of the polynomial curve; 1 is a straight line."""
    end_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the last step."""

    def unread(self) -> dict[str, str]:
        keys = {"constant": ("power", "end_lr"), "polynomial": ()}.get(self.name, ("power",))
        return {
            key: f"schedule.name = {self.name} does not read schedule.{key}; remove it"
            for key in keys
        }


class EngineSection(NamedSection):
    """How parameters, gradients and optimizer state are spread over the ranks."""

    name: Literal["auto", "replicated", "fsdp2", "zero"] = "auto"
    """auto picks by launcher and device; replicated = one process or DDP; fsdp2; zero = DeepSpeed
    ZeRO 0-3."""
    config: Place | None = None
    """A path, or a file of configs/deepspeed (zero) or configs/fsdp2 (fsdp2); null = zero2.json or
    shard.yaml."""

    @model_validator(mode="after")
    def _config_fits(self) -> EngineSection:
        kind = {"zero": ".json", "fsdp2": ".yaml"}.get(self.name)
        if self.config is not None and kind is None:
            text = (
                f"engine.name = {self.name} has no config file: set engine.name to zero or "
                "fsdp2, or remove this"
            )
            raise refusal(("config", text))
        if self.config is not None and kind is not None and not self.config.endswith(kind):
            raise refusal(
                ("config", f"engine.name = {self.name} reads a {kind} file; change one of the two")
            )
        return self


class EarlyStoppingSection(Section):
    """Ending a run before its last step, once it no longer gets better on validation."""

    patience: Positive
    """Validation runs (eval.every_steps) in a row without an improvement after which the run
    ends."""
    min_delta: AtLeast = 0.0
    """Only what is better than the best so far by more than this is an improvement."""


class TrainSection(Section):
    """How long, how many at once, and with which random numbers."""

    steps: Positive | None = None
    """Optimizer steps of the whole run; exactly one of steps and epochs is given."""
    epochs: Positive | None = None
    """Passes over the training rows; the last, incomplete batch of a pass is filled from the next
    one."""
    global_batch: Positive
    """Sequences or examples per optimizer step over all ranks."""
    micro_batch: Positive
    """Sequences or examples of one forward pass on one rank; accumulation = global_batch /
    (micro_batch x ranks)."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest global 2-norm of the gradient of the last pass; null = no clipping."""
    seed: NotNegative = 0
    """Seed of initialisation, data order, dropout and noise."""
    early_stopping: EarlyStoppingSection | None = None
    """End when eval.key no longer gets better; the run is finished then. null = after the last
    step. The schedule is that of all steps."""
    stop_after: Positive | None = None
    """End after this step as a preemption would: checkpoint, exit 75; null = run to the end."""
    max_skipped: Positive = 3
    """Steps in a row that may be skipped for NaN or Inf before the run ends with exit 3."""
    self_check: bool = True
    """Check on the first batch that epsilon moves the loss, is as long as the radius, and is undone
    bitwise."""
    log_every: Positive = 1
    """Optimizer steps between lines of metrics.jsonl."""
    probe_every: Positive = 10
    """Optimizer steps between measurements of what the perturbation did to the working copy
    (cosine, projection)."""
    effect_every: Positive | None = 1000
    """Optimizer steps between measurements of how far the row's gradient is from the base
    optimizer's (docs/choosing.md), at the price of two base steps and one of the row's each; also
    at steps 3, 30 and 100. null = never."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak of one device at model.dtype, in TFLOP/s, for `mfu`; null = the data sheet's of A100,
    H100, H200, else no mfu."""
    timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds without progress after which a rank gives up with exit 6, naming where it was."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            both = "both are" if self.steps else "neither is"
            text = (
                f"{both} given: exactly one of train.steps and train.epochs is needed (null "
                "unsets one)"
            )
            raise refusal(("steps", text))
        return self


class GenerateSection(Section):
    """Greedy continuations of a few prompts, for a person to read."""

    prompts: Annotated[list[str], Field(min_length=1)]
    """Texts to go on from; of instruction what a user says, in the chat template."""
    max_tokens: Positive = 64
    """Most tokens that follow a prompt. Each is a forward pass of every rank, without a cache."""
    each_validation: bool = False
    """Also after every validation run (in metrics.jsonl), not only at the end (in
    results.json)."""


class EvalSection(Section):
    """When and on what the model is scored."""

    every_steps: Positive | None = None
    """Optimizer steps between validation runs, which score validation splits alone; null = none."""
    domains: Literal["trained", "all"] = "trained"
    """What validation runs score: the training domains, or also each zero-shot domain that has a
    validation split, which takes as much longer."""
    key: str = "validation_loss"
    """What eval.select: best and train.early_stopping go by: validation_loss, the mean over the
    training domains, or with domains: all `validation/DOMAIN/METRIC` and
    `validation/zero_shot/METRIC`. Accuracies are to rise, losses and perplexities to fall."""
    initial: bool = False
    """Score the weights before the first step too: results.json then has both."""
    batch: Positive | None = None
    """Sequences or examples of one evaluation forward pass on one rank; null =
    train.micro_batch."""
    select: Literal["final", "best"] = "final"
    """Which weights are evaluated and exported: the last, or those of the best validation run by
    eval.key."""
    weights: Literal["last", "ema"] = "last"
    """What a step's weights are where they are scored, selected and exported: theta itself, or its
    moving average, which mesa and asam_mesa keep (algorithm.decay; buffers are theta's)."""
    splits: list[Literal["validation", "test"]] = Field(default=["test"])
    """Splits scored at the end, for every domain, in results.json."""
    generate: GenerateSection | None = None
    """Samples of a language model's text; null = none."""

    @field_validator("key")
    @classmethod
    def _of_a_record(cls, key: str) -> str:
        if key != "validation_loss" and not re.fullmatch(r"validation/.+/[^/]+", key):
            text = "validation_loss, validation/DOMAIN/METRIC or validation/zero_shot/METRIC"
            raise refusal(("", f"expected {text}"))
        return key

    @model_validator(mode="after")
    def _best_is_measured(self) -> EvalSection:
        if self.select == "best" and self.every_steps is None:
            raise refusal(
                ("select", "best needs validation runs: set eval.every_steps, or select final")
            )
        if self.domains == "all" and self.every_steps is None:
            text = "is what validation runs score: set eval.every_steps, or this to trained"
            raise refusal(("domains", text))
        if self.generate and self.generate.each_validation and self.every_steps is None:
            text = "there are no validation runs: set eval.every_steps, or this to false"
            raise refusal(("generate.each_validation", text))
        if self.key != "validation_loss" and self.domains != "all":
            text = (
                "eval.domains = trained measures validation_loss alone: set that to all, or this "
                "to validation_loss"
            )
            raise refusal(("key", text))
        return self


class CheckpointSection(Section):
    """When the run saves everything it needs to continue bit for bit."""

    every_steps: Positive | None = None
    """Optimizer steps between checkpoints; null = by every_minutes alone."""
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Most minutes between checkpoints, whatever every_steps says; null = no limit. A run that is
    stopped, and one that ends, saves in any case."""
    keep: Positive = 2
    """Newest checkpoints kept; older ones are deleted once a newer one stands."""
    wait: Annotated[float, Field(ge=0)] = 10.0
    """Minutes that a save or an export waits for room on a full disk before the run gives up with
    exit 4."""
    asynchronous: bool = False
    """Write in the background while the next step's passes run; its descent waits for the writing.
    Nothing is copied for it. Rows that remember weights (theta_{t-1}, an average) keep those of
    before that step until then, 4 bytes per parameter over the ranks that share them."""


class ExportSection(Section):
    """The trained weights as Hugging Face's files, which every rank writes its own part of."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the exported weights; bfloat16 is half as large and rounds the masters. The scores of
    `eval.select: best` are then those of the rounded weights."""
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(KB|MB|GB)$")] = "5GB"
    """Largest file of an export, such as 500MB; a larger model is several files with an index."""


class TrackingSection(Section):
    """MLflow; `metrics.jsonl` in the run folder is written in any case."""

    enabled: bool = True
    """Log to MLflow (rank 0 only; a tracking failure never stops training)."""
    experiment: str | None = None
    """MLflow experiment; null = MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else the recipe's
    name."""
    uri: str | None = None
    """Tracking server or sqlite:/// database; null = MLFLOW_TRACKING_URI, else mlflow.db in the
    folder the command is run in."""

    @field_validator("uri")
    @classmethod
    def _expanded(cls, uri: str | None) -> str | None:
        return uri and expanded_uri(uri)

    @model_validator(mode="after")
    def _no_credentials(self) -> TrackingSection:
        if self.uri and "@" in self.uri.partition("://")[2].partition("/")[0]:
            text = (
                "holds credentials: put them in MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
            raise refusal(("uri", text))
        return self

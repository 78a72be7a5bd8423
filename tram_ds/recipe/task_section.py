"""The section `task` of a recipe: what is learned, from which data, and where it is evaluated."""

from __future__ import annotations

import pkgutil
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tram_ds.runtime.checked import NamedSection, NotNegative, Positive, Section, chosen, refusal
from tram_ds.runtime.paths import Place


def task_names() -> list[str]:
    """The modules under tram_ds/tasks: adding a task is adding a file there."""
    import tram_ds.tasks as folder

    return sorted(
        found.name
        for found in pkgutil.iter_modules(folder.__path__)
        if found.name not in ("causal", "choose", "classes", "protocol", "streaming")
    )


ROWS = ("files", "column", "domain_column", "held_out", "held_out_seed")


class StreamingSection(Section):
    """Reading training rows where they are needed, instead of once into the cache."""

    buffer: Positive = 10000
    """Rows of seq_len that are shuffled among each other and held in memory, by every rank; 1 = the
    order of the files."""


class TaskSection(NamedSection):
    """What is learned, from which data, and where it is evaluated."""

    name: str
    """language_modeling, instruction, entailment or image_classification: a module of
    tram_ds/tasks."""
    data: Place
    """A hub id, a local folder, `installed_docs` (text of the installed packages) or `generated` (a
    tiny made-up set). language_modeling: also a file of text or rows, or a folder of them;
    instruction: a file or folder of conversations (docs/data.md). Of these two, a hub id may be
    that of any data set with files of rows."""
    revision: str | None = None
    """Branch, tag or commit of task.data on the hub; null = its main branch. Two repositories:
    `train,test`."""
    files: str | None = None
    """Of a data set of the hub with files of rows: which of them, as a pattern of their paths such
    as `en/*` or `data/*_sft-*`; null = all that can be read."""
    train: str | None = None
    """Domain or language to train on; `all` = every domain not in task.exclude; null = the source's
    first (images: its only one)."""
    exclude: list[str] = Field(default=[])
    """Domains left out of `train: all` and of `eval: null`."""
    eval: list[str] | None = None
    """Domains or languages for zero-shot evaluation; null = all except the training one. The
    training one is always scored."""
    column: str = "text"
    """Of files of rows: the column that holds the text."""
    domain_column: str | None = None
    """Of files of rows: the column that names a row's domain; null = by file."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Of files of rows: share of the training rows that each of validation and test gets where
    there is no file of it; equal rows stay together."""
    held_out_seed: NotNegative = 0
    """Which rows are held out; not train.seed, so that runs of several seeds are scored on the
    same."""
    streaming: StreamingSection | None = None
    """Of language_modeling, with files of rows: read and tokenise them while the run goes, keep
    nothing of them (docs/data.md); null = read and tokenise them once, into task.cache_dir."""
    seq_len: Positive = 1024
    """Tokens per sequence: exactly (language_modeling, packed blocks) or at most (instruction and
    entailment, cut there)."""
    tokenizer: Place | None = None
    """Hub id or folder of the tokenizer; null = model.path, or, for model.init, one trained on the
    training text."""
    packing: bool = False
    """Of instruction: several training conversations in one row of seq_len, none of which sees
    another; train.global_batch then counts packed rows."""
    chat_template: Place | None = None
    """Of instruction: path of a Jinja chat template; null = the tokenizer's own."""
    bos: Literal["auto", "none", "block", "document"] = "auto"
    """Where the tokenizer's beginning-of-text token goes: before every block of seq_len (which it
    counts in), once before a domain's text, or nowhere; auto = block where the tokenizer begins
    every text with it."""
    m2d2_ref: bool = False
    """Perplexity as M2D2's reference script computes it (slightly biased) instead of the exact mean
    over predicted tokens."""
    max_train_tokens: Positive | None = None
    """Most training tokens used, in tokens; null = all."""
    max_eval_tokens: Positive | None = None
    """Most tokens scored per evaluation domain, in tokens; null = all."""
    cache_dir: Place | None = None
    """Folder for extracted and tokenised data, and for the safetensors made of a model that has
    pickles alone; null = the user's cache folder."""

    def unread(self) -> dict[str, str]:
        text_only = {"seq_len", "tokenizer"} if self.name == "image_classification" else set()
        if self.name != "language_modeling":
            text_only |= {"bos", "m2d2_ref", "max_train_tokens", "max_eval_tokens", "column"}
            text_only |= {"streaming"}
        if self.name != "instruction":
            text_only |= {"chat_template", "packing"}
        if self.name not in ("language_modeling", "instruction"):
            text_only |= {*ROWS}
        return {
            key: f"task.name = {self.name} does not read task.{key}; remove one of the two"
            for key in text_only
        }

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return chosen(value, task_names())

    @model_validator(mode="after")
    def _streams(self) -> TaskSection:
        if self.streaming is not None and self.domain_column is not None:
            text = (
                "which domains there are is known only when all rows are read: set task.streaming "
                "to null, or give each domain a file or folder of its own"
            )
            raise refusal(("domain_column", text))
        if self.streaming is not None and self.train == "all":
            text = (
                "a stream reads one domain after the other: name one, or set task.streaming to null"
            )
            raise refusal(("train", text))
        return self

    @model_validator(mode="after")
    def _exclude_fits(self) -> TaskSection:
        if self.train in self.exclude:
            text = (
                f"task.train = {self.train} is also in task.exclude; remove it from one of the two"
            )
            raise refusal(("exclude", text))
        return self

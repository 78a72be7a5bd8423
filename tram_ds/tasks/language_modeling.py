"""Causal language modeling on packed blocks: one training domain, perplexity on many (M2D2's
protocol).

A row is `seq_len` consecutive tokens of one domain, or, with `task.bos: block`, the token that
begins a text and one fewer. Every position of a row is valid, and every token but the row's first
is predicted and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tram_ds.data.choose import open_source, open_stream
from tram_ds.data.domains import chosen, scored
from tram_ds.data.own_text import OwnText
from tram_ds.data.sources import Source
from tram_ds.data.stream import Stream
from tram_ds.data.streamed import StreamedText
from tram_ds.data.tokenize import Blocks, blocks, tokenize
from tram_ds.data.usable import Reading
from tram_ds.models.chunked import Chunked
from tram_ds.models.config import load_config
from tram_ds.models.output import Batch, Output
from tram_ds.models.pretrained import load_model
from tram_ds.runtime.errors import DataError
from tram_ds.tasks import causal
from tram_ds.tasks.protocol import Load
from tram_ds.tasks.streaming import stream_of, streamed_tokens


def build(recipe: Any, training: bool = True) -> LanguageModeling:
    """The task of a recipe. Data, tokeniser and model config are checked (DataError) before any
    weight is read.

    training: False where only evaluation follows: no train split is needed.
    """
    task = recipe.task
    reading = Reading(task.column, task.domain_column, task.held_out, task.held_out_seed)
    if task.streaming is None:
        source = open_source(task.data, task.cache_dir, task.revision, reading, task.files)
    else:
        source = open_stream(task.data, task.revision, reading, task.files)
    train, evaluated = chosen(task, source.domains(), source.splits)
    return LanguageModeling(recipe, source, train, evaluated, training)


class LanguageModeling:
    """Implements tram_ds.tasks.protocol.Task. `tokenizer` belongs beside an exported model."""

    noise_site: Literal["embedding", "pixel_values"] = "embedding"
    classification = False
    metric = "perplexity"

    def __init__(
        self,
        recipe: Any,
        source: Source,
        train_domains: list[str],
        eval_domains: list[str],
        training: bool = True,
    ) -> None:
        """eval_domains: those scored, the training domains first."""
        self.settings, self.model_section, self.seed = recipe.task, recipe.model, recipe.train.seed
        self.source, self.train_domains, self.eval_domains = source, train_domains, eval_domains
        self.trained_on = train_domains if training else []
        self.tokenizer = causal.named_tokenizer(
            self.settings, self.model_section
        ) or causal.fresh_tokenizer(self.settings, self.model_section, source)
        seq_len = self.settings.seq_len
        self.defaults = causal.config_defaults(self.model_section, self.tokenizer, seq_len)
        causal.check_config(
            load_config(self.model_section, **self.defaults), self.tokenizer, seq_len
        )
        self.bos = resolved_bos(self.settings.bos, self.tokenizer)
        self.block_prefix = self._bos_ids("block")
        # kept, because validation asks for the same splits again and again
        self.tokens = cache(self._tokens)
        self.stream = self._stream(recipe) if training else None
        if training:
            self.train_rows()
        if training and recipe.eval.every_steps:
            self.eval_sets("validation")
        for split in recipe.eval.splits:
            self.eval_sets(split)

    def model(self, load: Load = load_model) -> nn.Module:
        return load(
            AutoModelForCausalLM,
            self.model_section,
            seed=self.seed,
            cache_dir=self.settings.cache_dir,
            **self.defaults,
        )

    def train_rows(self) -> Sequence[np.ndarray] | Stream:
        """Rows (seq_len,) int64 of the training domains, one after the other, without shorter last
        rows."""
        if self.stream is not None:
            return self.stream
        limit = self.settings.max_train_tokens
        share = limit // len(self.train_domains) if limit else None
        parts = [
            self._rows(domain, "train", share, keep_partial=False) for domain in self.train_domains
        ]
        return causal.joined(parts)

    def eval_sets(self, split: Literal["validation", "test"]) -> Mapping[str, Sequence[np.ndarray]]:
        """Domain -> rows, the last of which may be shorter. Only zero-shot domains may lack a
        validation split."""
        name = "valid" if split == "validation" else "test"
        limit = self.settings.max_eval_tokens
        there = scored(self.eval_domains, self.train_domains, name, self.source.splits)
        return {domain: self._rows(domain, name, limit, keep_partial=True) for domain in there}

    def collate(self, rows: Sequence[np.ndarray]) -> Batch:
        """{input_ids (B, T)} int64, padded on the right with attention_mask (B, T) if the rows are
        uneven."""
        if len({len(row) for row in rows}) == 1:
            return {"input_ids": torch.from_numpy(np.stack(rows))}
        input_ids, mask = causal.right_padded(rows, self.tokenizer.pad_token_id or 0)
        return {"input_ids": input_ids, "attention_mask": mask}

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        return causal.output(model, batch)

    def chunked(self, model: nn.Module) -> Chunked | None:
        return causal.chunked(model, self.model_section)

    def counts(self, batch: Batch) -> tuple[int, int]:
        return causal.counts(batch)

    def metrics(self, loss_sum: float, count: float, correct: float) -> dict[str, float]:
        return causal.perplexity(loss_sum, count)

    def row_sums(self, output: Output, batch: Batch) -> Tensor:
        """(B, 3) fp64 of every row: those of `forward`, or M2D2's.

        `task.m2d2_ref`: the reference script weights the mean loss of a row's len - 1 predictions
        with len and divides by the total length (M2D2's validate_on_multiple_files.py).
        """
        found = causal.row_sums(output, batch)
        if self.settings.m2d2_ref:
            ids = batch["input_ids"]
            length = batch.get("attention_mask", torch.ones_like(ids)).sum(1).double()
            found[:, 0] *= length / (length - 1)
            found[:, 1] = length
        return found

    def prompt(self, text: str) -> list[int]:
        """The ids that a continuation of the text follows, begun as a document is."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*self._bos_ids("document"), *self.block_prefix, *ids]

    def ends(self) -> set[int]:
        """What ends a text."""
        end = self.tokenizer.eos_token_id
        return set() if end is None else {int(end)}

    def said(self) -> dict[str, str]:
        """What the numbers depend on and the recipe leaves to tokeniser and files: `bos`, as
        resolved, and the rows that were read."""
        own = self.source.said() if isinstance(self.source, OwnText | StreamedText) else {}
        streaming = {} if self.stream is None else {"streaming": self.stream.said()}
        return {"bos": self.bos, **streaming, **own}

    def data_digest(self) -> str:
        """sha256 (hex) of all the text that is read: the training domains' train where there is
        training, the scored ones' valid and test."""
        return causal.read_digest(self.source, self.trained_on, self.eval_domains)

    def contents(self) -> dict[str, dict[str, str]]:
        """Split -> domain -> sha256 (hex) of its text, of all that is read."""
        return causal.contents(self.source, self.trained_on, self.eval_domains)

    def _stream(self, recipe: Any) -> Stream | None:
        """The training rows, where task.streaming asks for it."""
        if not isinstance(self.source, StreamedText):
            return None
        return stream_of(
            self.source,
            self.train_domains[0],
            self.tokenizer,
            recipe,
            self._bos_ids("document"),
            self.block_prefix,
        )

    def _rows(self, domain: str, split: str, max_tokens: int | None, keep_partial: bool) -> Blocks:
        tokens = self.tokens(domain, split, max_tokens)
        rows = blocks(tokens, self.settings.seq_len, keep_partial, self.block_prefix)
        if not len(rows):
            needed = (
                "2 tokens" if keep_partial else f"one block of task.seq_len {self.settings.seq_len}"
            )
            raise DataError(
                f"the {split} split of domain '{domain}' is too short: {len(tokens)} tokens "
                f"found, {needed} needed; "
                f"give more text or a smaller task.seq_len"
            )
        return rows

    def _tokens(self, domain: str, split: str, max_tokens: int | None) -> np.ndarray:
        if isinstance(self.source, StreamedText):
            return streamed_tokens(
                self.source, domain, split, self.tokenizer, max_tokens, self._bos_ids("document")
            )
        return tokenize(
            self.source,
            domain,
            split,
            self.tokenizer,
            self.settings.cache_dir,
            max_tokens,
            self._bos_ids("document"),
        )

    def _bos_ids(self, where: str) -> tuple[int, ...]:
        return (int(self.tokenizer.bos_token_id),) if self.bos == where else ()


def resolved_bos(wanted: str, tokenizer: Any) -> str:
    """Where the beginning-of-text token goes: `none`, `block` or `document`; `auto` is `block` for
    tokenisers that begin every text with it by themselves. DataError if there is no such token."""
    bos = tokenizer.bos_token_id
    if wanted == "auto":
        begun = tokenizer("a", verbose=False)["input_ids"] if bos is not None else []
        return "block" if len(begun) > 1 and begun[0] == bos else "none"
    if wanted != "none" and bos is None:
        raise DataError(
            f"task.bos {wanted}: the tokeniser has no beginning-of-text token; set task.bos to none"
        )
    return wanted

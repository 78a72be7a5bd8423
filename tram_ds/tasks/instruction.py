"""Instruction tuning: conversations in a chat template, of which the assistant's answers are
learned.

A row is one conversation, at most `seq_len` tokens of it, or a pack of several. Every token of
every answer, with the one that ends it, is predicted and counted in the loss; the distance counts
every position that is not padding, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tram_ds.data.chat import CHATML, CHATML_TOKENS, Chat, Unmarkable
from tram_ds.data.choose import open_conversations
from tram_ds.data.conversations import Contents
from tram_ds.data.domains import chosen, scored
from tram_ds.data.examples import Example, Examples, open_examples
from tram_ds.data.own_text import OwnText
from tram_ds.data.packing import Packs
from tram_ds.data.usable import Reading
from tram_ds.models.chunked import Chunked
from tram_ds.models.config import load_config
from tram_ds.models.logit_chunks import IGNORED
from tram_ds.models.output import Batch, Output
from tram_ds.models.pretrained import load_model
from tram_ds.runtime.errors import DataError
from tram_ds.tasks import causal
from tram_ds.tasks.protocol import Load


def build(recipe: Any, training: bool = True) -> Instruction:
    """The task of a recipe. Data, tokeniser, template and model config are checked (DataError)
    before any weight is read.

    training: False where only evaluation follows: no train split is needed.
    """
    task = recipe.task
    reading = Reading(
        domain_column=task.domain_column,
        held_out=task.held_out,
        held_out_seed=task.held_out_seed,
    )
    source = open_conversations(task.data, task.cache_dir, task.revision, reading, task.files)
    train, evaluated = chosen(task, source.domains(), source.splits)
    return Instruction(recipe, source, train, evaluated, training)


class Instruction:
    """Implements tram_ds.tasks.protocol.Task. `tokenizer`, with the template in it, belongs beside
    an exported model."""

    noise_site: Literal["embedding", "pixel_values"] = "embedding"
    classification = False
    metric = "perplexity"

    def __init__(
        self,
        recipe: Any,
        source: OwnText,
        train_domains: list[str],
        eval_domains: list[str],
        training: bool = True,
    ) -> None:
        """eval_domains: those scored, the training domains first."""
        self.settings, self.model_section, self.seed = recipe.task, recipe.model, recipe.train.seed
        self.source, self.train_domains, self.eval_domains = source, train_domains, eval_domains
        self.trained_on = train_domains if training else []
        self.opened: dict[tuple[str, str], Examples] = {}
        self.tokenizer = _tokenizer(self.settings, self.model_section, source)
        self.chat = _chat(self.settings, self.tokenizer)
        seq_len = self.settings.seq_len
        self.defaults = causal.config_defaults(self.model_section, self.tokenizer, seq_len)
        causal.check_config(
            load_config(self.model_section, **self.defaults), self.tokenizer, seq_len
        )
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

    def train_rows(self) -> Sequence[Example] | Sequence[list[Example]]:
        """Conversations of the training domains, one domain after the other; packs of them where
        task.packing asks for that."""
        parts = [self._open(domain, "train") for domain in self.train_domains]
        if not self.settings.packing:
            return causal.joined(parts)
        return causal.joined([Packs(part, self.settings.seq_len) for part in parts])

    def eval_sets(self, split: Literal["validation", "test"]) -> Mapping[str, Sequence[Example]]:
        """Domain -> conversations. Only zero-shot domains may lack a validation split."""
        name = "valid" if split == "validation" else "test"
        there = scored(self.eval_domains, self.train_domains, name, self.source.splits)
        return {domain: self._open(domain, name) for domain in there}

    def collate(self, rows: Sequence[Example] | Sequence[list[Example]]) -> Batch:
        """{input_ids, attention_mask, labels} (B, T) int64, padded on the right; labels are the
        answers' tokens, IGNORED elsewhere. Of packs also position_ids, which begin at 0 with every
        conversation."""
        packs = [row if isinstance(row, list) else [row] for row in rows]
        joined = [np.concatenate([ids for ids, _ in pack]) for pack in packs]
        # or 0, where there is none: a causal model does not look ahead to what pads on the right
        ids, mask = causal.right_padded(joined, self.tokenizer.pad_token_id or 0)
        targets = [np.concatenate([_targets(*row) for row in pack]) for pack in packs]
        labels, _ = causal.right_padded(targets, IGNORED)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if any(isinstance(row, list) for row in rows):
            batch["position_ids"] = causal.positions(packs, ids.shape[1])
        return batch

    def examine(self, model: nn.Module) -> None:
        """Before the first step, at whatever weights: conversations of a pack do not see each
        other. DataError where they do. Collective, two short forward passes."""
        if self.settings.packing:
            causal.refuse_seeing(model, self.settings.seq_len)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        return causal.output(model, batch)

    def chunked(self, model: nn.Module) -> Chunked | None:
        return causal.chunked(model, self.model_section)

    def counts(self, batch: Batch) -> tuple[int, int]:
        return causal.counts(batch)

    def row_sums(self, output: Output, batch: Batch) -> Tensor:
        return causal.row_sums(output, batch)

    def metrics(self, loss_sum: float, count: float, correct: float) -> dict[str, float]:
        """Of the answers' tokens: mean loss in nats and its exponential."""
        return causal.perplexity(loss_sum, count)

    def prompt(self, text: str) -> list[int]:
        """The ids that the answer to a user's words follows. DataError where the template has no
        place for it."""
        try:
            return self.chat.asked(text)
        except Unmarkable as error:
            raise DataError(f"eval.generate.prompts: {error}") from None

    def ends(self) -> set[int]:
        """What ends an answer: the template's token, or the tokeniser's."""
        end = self.tokenizer.eos_token_id
        return self.chat.ends() | (set() if end is None else {int(end)})

    def said(self) -> dict[str, str]:
        """Which rows were read, held out, shortened and left out, of the splits that are used."""
        cuts = {key: examples.cut for key, examples in self.opened.items()}
        rows, truncated = (
            sum(getattr(cut, name) for cut in cuts.values()) for name in ("rows", "truncated")
        )
        said = self.source.said() | {
            "truncated": f"{truncated} of {rows} rows, to task.seq_len {self.settings.seq_len}"
        }
        if lost := [cut for cut in cuts.values() if cut.left_out]:
            first = [f"{at}: {why}" for cut in lost for at, why in cut.first.items()][:3]
            number = sum(cut.left_out for cut in lost)
            said["no_answers"] = f"{number} row{'s' * (number != 1)}: {'; '.join(first)}"
        return said

    def data_digest(self) -> str:
        """sha256 (hex) of all the conversations that are read."""
        return causal.read_digest(self.source, self.trained_on, self.eval_domains)

    def contents(self) -> dict[str, dict[str, str]]:
        """Split -> domain -> sha256 (hex) of its conversations, of all that is read."""
        return causal.contents(self.source, self.trained_on, self.eval_domains)

    def _open(self, domain: str, split: str) -> Examples:
        if (domain, split) not in self.opened:
            self.opened[domain, split] = open_examples(
                self.source,
                domain,
                split,
                self.chat,
                self.settings.seq_len,
                self.settings.cache_dir,
            )
        return self.opened[domain, split]


def _targets(ids: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(T,) what is predicted of a conversation: never its first token, before which nothing
    stands, or in a pack another conversation."""
    targets = np.where(answers, ids, IGNORED)
    targets[0] = IGNORED
    return targets


def _tokenizer(task: Any, model: Any, source: OwnText) -> Any:
    """The one named, or, for a fresh model, one trained on what is said, in ChatML."""
    if (named := causal.named_tokenizer(task, model)) is not None:
        if not getattr(named, "is_fast", False):
            raise DataError(
                f"the tokeniser of '{task.tokenizer or model.path}' has no tokenizer.json, which "
                "says where in the text a token is: task.name = instruction needs it"
            )
        return named
    # reserved: with ChatML's tokens added it is as large as model.init.vocab_size says
    fresh = causal.fresh_tokenizer(task, model, Contents(source), reserved=len(CHATML_TOKENS))
    fresh.add_special_tokens({"additional_special_tokens": CHATML_TOKENS})
    fresh.chat_template = CHATML
    return fresh


def _chat(task: Any, tokenizer: Any) -> Chat:
    """The tokeniser with its template, or with that of task.chat_template."""
    if task.chat_template is not None:
        try:
            text = Path(task.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"task.chat_template {task.chat_template} cannot be read ({error}): give the path "
                "of a Jinja template"
            ) from error
        tokenizer.chat_template = text
    try:
        return Chat(tokenizer, tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            f"the tokeniser of '{tokenizer.name_or_path}' has no chat template: set "
            "task.chat_template to the path of the one the model is to be used with, or "
            "task.tokenizer to a tokeniser that has one"
        ) from error

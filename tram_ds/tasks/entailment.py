"""Does one sentence follow from another? Trained in one language, accuracy in many (XNLI's
zero-shot protocol).

A row is (premise, hypothesis, label) as text; it is tokenised when it is collated. One position per
example: the logits are (B, 3), so padding is in no loss and in no distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from tram_ds.data.cache import digest_of
from tram_ds.data.domains import chosen, scored
from tram_ds.data.pair_bpe import pair_tokenizer
from tram_ds.data.tables import Table
from tram_ds.data.tokenize import vocabulary_size
from tram_ds.data.xnli import LABELS, Pairs, open_pairs
from tram_ds.models.config import load_config
from tram_ds.models.label_names import numbers_by_name, set_label_names
from tram_ds.models.output import Batch, Output
from tram_ds.models.pretrained import load_model
from tram_ds.models.processors import has_tokenizer, load_tokenizer
from tram_ds.runtime.errors import DataError
from tram_ds.tasks import classes
from tram_ds.tasks.protocol import Load

SAMPLE = 50_000  # training rows a fresh model's tokeniser is trained on
# model types whose positions begin at pad_token_id + 1: XLM-R's 514 are for 512 tokens
PAD_OFFSET = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "data2vec-text",
    "mpnet",
    "esm",
)


def build(recipe: Any, training: bool = True) -> Entailment:
    """The task of a recipe. Data, tokeniser and model config are checked (DataError) before any
    weight is read.

    training: False where only evaluation follows: no train split is needed.
    """
    pairs = open_pairs(recipe.task.data, recipe.task.cache_dir, recipe.task.revision)
    train, evaluated = chosen(recipe.task, pairs.languages(), pairs.splits, "language")
    return Entailment(recipe, pairs, train, evaluated, training)


class Entailment:
    """Implements tram_ds.tasks.protocol.Task. `tokenizer` belongs beside an exported model."""

    noise_site: Literal["embedding", "pixel_values"] = "embedding"
    classification = True
    metric = "accuracy"

    def __init__(
        self,
        recipe: Any,
        pairs: Pairs,
        train_languages: list[str],
        eval_languages: list[str],
        training: bool = True,
    ) -> None:
        """eval_languages: those scored, the training ones first."""
        self.settings, self.model_section, self.seed = recipe.task, recipe.model, recipe.train.seed
        self.pairs, self.train_domains, self.eval_domains = pairs, train_languages, eval_languages
        self.training = training
        self.opened: dict[tuple[str, str], Table] = {}
        self.tokenizer = self._tokenizer()
        config = load_config(self.model_section, **self._config_values())
        self._check_config(config)
        path = self.model_section.path
        self.numbers = numbers_by_name(path, config, LABELS, f"task.data {self.settings.data}")
        if training:
            self.train_rows()
        if training and recipe.eval.every_steps:
            self._open(self.train_domains[:1], "validation")
        for split in recipe.eval.splits:
            self.eval_sets(split)

    def model(self, load: Load = load_model) -> nn.Module:
        """With a new head of three labels, in the order of XNLI, unless `model.path` has one: that
        keeps its own order, known by the names in its config."""
        model: Any = load(
            AutoModelForSequenceClassification,
            self.model_section,
            seed=self.seed,
            new_head=True,
            cache_dir=self.settings.cache_dir,
            **self._config_values(),
        )
        set_label_names(model.config, LABELS, self.numbers)
        return model

    def train_rows(self) -> Sequence[tuple[str, str, int]]:
        return self._open(self.train_domains, "train")

    def eval_sets(
        self, split: Literal["validation", "test"]
    ) -> Mapping[str, Sequence[tuple[str, str, int]]]:
        """Language -> rows. Only zero-shot languages may lack a validation split."""
        there = scored(self.eval_domains, self.train_domains, split, self.pairs.splits)
        return {name: self._open([name], split) for name in there}

    def collate(self, rows: Sequence[tuple[str, str, int]]) -> Batch:
        """What the tokeniser makes of the pairs, cut to `seq_len` and padded to the longest; labels
        (B,), as the model numbers them."""
        premises, hypotheses, labels = zip(*rows, strict=True)
        encoded = self.tokenizer(
            list(premises),
            list(hypotheses),
            truncation="longest_first",
            max_length=self.settings.seq_len,
            padding=True,
            return_tensors="pt",
            verbose=False,
        )
        return {**encoded, "labels": self.numbers[list(labels)]}

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits  # (B, 3)
        loss_sum = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
        return Output(loss_sum, len(logits), logits, rows=len(logits))

    def chunked(self, model: nn.Module) -> None:
        """None: a few classes per example."""

    def counts(self, batch: Batch) -> tuple[int, int]:
        return len(batch["labels"]), len(batch["labels"])

    def row_sums(self, output: Output, batch: Batch) -> Tensor:
        return classes.row_sums(output.logits, batch["labels"])

    def metrics(self, loss_sum: float, count: float, correct: float) -> dict[str, float]:
        """Mean loss in nats per example, and the fraction of examples with the right label."""
        return {"loss": loss_sum / count, "accuracy": correct / count}

    def data_digest(self) -> str:
        """Hex digest of all the rows that are read: the training ones where there is training,
        and the scored languages' validation and test."""
        held_out = self.contents()
        train = [f"train\0{digest}" for digest in held_out.pop("train", {}).values()]
        lines = [
            f"{name}\0{split}\0{digest}"
            for split, languages in held_out.items()
            for name, digest in languages.items()
        ]
        return digest_of(*train, *sorted(lines))

    def contents(self) -> dict[str, dict[str, str]]:
        """Split -> language -> hex digest of its rows, of all that is read. The training languages
        are one entry, since they are one set of rows."""
        found: dict[str, dict[str, str]] = {}
        if self.training:
            digest = self._open(self.train_domains, "train").digest
            found["train"] = {" ".join(self.train_domains): digest}
        for name in self.eval_domains:
            for split in self.pairs.splits(name):
                if split != "train":
                    found.setdefault(split, {})[name] = self._open([name], split).digest
        return found

    def _open(self, languages: Sequence[str], split: str) -> Table:
        key = (" ".join(languages), split)
        if key not in self.opened:
            self.opened[key] = self.pairs.open(languages, split)
        return self.opened[key]

    def _tokenizer(self) -> Any:
        name, model = self.settings.tokenizer, self.model_section
        if name is None and model.path is None:
            table = self._open(self.train_domains, "train")
            texts = chain.from_iterable(
                (premise, hypothesis) for premise, hypothesis, _ in islice(table, SAMPLE)
            )
            vocabulary = (model.init or {}).get("vocab_size")
            size = {"vocab_size": vocabulary} if vocabulary else {}
            return pair_tokenizer(table.digest, texts, self.settings.cache_dir, **size)
        if name is None and not has_tokenizer(model.path):
            raise DataError(
                f"model.path '{model.path}' holds no tokeniser; set task.tokenizer to the one it "
                "was trained with"
            )
        tokenizer = (
            load_tokenizer(name, key="task.tokenizer")
            if name is not None
            else load_tokenizer(model.path, model.revision)
        )
        if tokenizer.pad_token_id is None:  # decoders come without
            if tokenizer.eos_token is None:
                raise DataError(
                    f"the tokeniser of '{name or model.path}' has no token to pad with; add a "
                    "pad_token to it"
                )
            tokenizer.pad_token = tokenizer.eos_token
        # encoders classify from the first position, which must not be padding
        tokenizer.padding_side = "right"
        return tokenizer

    def _config_values(self) -> dict[str, Any]:
        """Config fields that follow from the task: they win over those of a path, and fill those an
        init leaves out."""
        values = {"num_labels": len(LABELS), "pad_token_id": self.tokenizer.pad_token_id}
        if self.model_section.path is not None:
            return values
        ends = {
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
        }
        # as PAD_OFFSET needs them; other types leave the last ones unused
        positions = self.settings.seq_len + self.tokenizer.pad_token_id + 1
        return (
            values
            | ends
            | {"vocab_size": vocabulary_size(self.tokenizer), "max_position_embeddings": positions}
        )

    def _check_config(self, config: Any) -> None:
        vocabulary, seq_len = vocabulary_size(self.tokenizer), self.settings.seq_len
        text = config.get_text_config()
        if vocabulary > text.vocab_size:
            raise DataError(
                f"the tokeniser has {vocabulary} entries but the model's vocabulary only "
                f"{text.vocab_size}: token ids "
                "would be out of range; set task.tokenizer to the model's own, or "
                "model.init.vocab_size to its size"
            )
        positions = getattr(text, "max_position_embeddings", None)
        if positions and config.model_type in PAD_OFFSET:
            positions -= self.tokenizer.pad_token_id + 1
        if positions and positions > 0 and seq_len > positions:
            raise DataError(
                f"task.seq_len {seq_len} exceeds the model's {positions} positions; set seq_len "
                f"<= {positions}"
            )
        if seq_len < 8:
            raise DataError(
                f"task.seq_len {seq_len} leaves no room for two sentences; set it to 8 or more"
            )

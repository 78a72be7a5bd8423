"""Image classification: one data set, top-1 accuracy on its test split (CIFAR-100, Stanford Cars,
Oxford Flowers).

A row is (RGB image, class), decoded when it is read. Images are resized and normalised by the
model's own processor and
not augmented: the paper names no augmentation, and without one a row is the same in every epoch and
at any world size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from tram_ds.data.cache import digest_of
from tram_ds.data.images import Images, ImageSource
from tram_ds.models.config import load_config
from tram_ds.models.label_names import numbers_by_name, set_label_names
from tram_ds.models.output import Batch, Output
from tram_ds.models.pretrained import load_model
from tram_ds.models.processors import load_image_processor, new_image_processor
from tram_ds.runtime.errors import DataError
from tram_ds.tasks import classes
from tram_ds.tasks.protocol import Load

IMAGE_SIZE = 32  # of a fresh model that does not say


def build(recipe: Any, training: bool = True) -> ImageClassification:
    """The task of a recipe. Data, processor and model config are checked (DataError) before any
    weight is read.

    training: every picture of every split is tried; False where only evaluation follows: those
    scored (the train split is opened for the names of the classes).
    """
    task = recipe.task
    source = ImageSource(task.data, task.cache_dir, task.revision)
    return ImageClassification(recipe, source, training)


class ImageClassification:
    """Implements tram_ds.tasks.protocol.Task. `processor` belongs beside an exported model."""

    noise_site: Literal["embedding", "pixel_values"] = "pixel_values"
    classification = True
    metric = "accuracy"

    def __init__(self, recipe: Any, source: ImageSource, training: bool = True) -> None:
        self.model_section, self.seed, self.source = recipe.model, recipe.train.seed, source
        self.train_domains = self.eval_domains = [source.name]
        self._check_names(recipe.task)
        self.opened: dict[str, Images] = {}
        self.cache_dir = recipe.task.cache_dir
        self.read = source.splits() if training else recipe.eval.splits
        config = load_config(self.model_section, **self._config_values())
        path = self.model_section.path
        self.numbers = numbers_by_name(path, config, source.classes, f"task.data {source.data}")
        self.processor = self._processor(config)
        self._check_config(config)
        self.train_rows()
        if recipe.eval.every_steps:
            self.eval_sets("validation")
        for split in recipe.eval.splits:
            self.eval_sets(split)
        for split in self.read:
            self._open(split).check(self.cache_dir)

    def model(self, load: Load = load_model) -> nn.Module:
        """With a new head of the data set's classes, unless `model.path` has one of that size."""
        values = self._config_values()
        model: Any = load(
            AutoModelForImageClassification,
            self.model_section,
            seed=self.seed,
            new_head=True,
            cache_dir=self.cache_dir,
            **values,
        )
        set_label_names(model.config, self.source.classes, self.numbers)
        return model

    def train_rows(self) -> Sequence[tuple[Image.Image, int]]:
        return self._open("train")

    def eval_sets(
        self, split: Literal["validation", "test"]
    ) -> Mapping[str, Sequence[tuple[Image.Image, int]]]:
        """The data set's name -> rows. The paper's three have no validation split: their final
        model is scored."""
        if split == "validation" and split not in self.source.splits():
            raise DataError(
                f"task.data {self.source.data} has no validation split; it has "
                f"{', '.join(self.source.splits())}: "
                "remove eval.every_steps and validation from eval.splits, or add "
                "validation*.parquet"
            )
        return {self.source.name: self._open(split)}

    def collate(self, rows: Sequence[tuple[Image.Image, int]]) -> Batch:
        """pixel_values (B, 3, H, W) float32 and labels (B,), as the model numbers them."""
        images, labels = zip(*rows, strict=True)
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": self.numbers[list(labels)]}

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        logits = model(pixel_values=batch["pixel_values"]).logits  # (B, C)
        loss_sum = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
        return Output(loss_sum, len(logits), logits, rows=len(logits))

    def chunked(self, model: nn.Module) -> None:
        """None: a few classes per example."""

    def counts(self, batch: Batch) -> tuple[int, int]:
        return len(batch["labels"]), len(batch["labels"])

    def row_sums(self, output: Output, batch: Batch) -> Tensor:
        return classes.row_sums(output.logits, batch["labels"])

    def metrics(self, loss_sum: float, count: float, correct: float) -> dict[str, float]:
        """Mean loss in nats per image, and the fraction of images with the right class (top-1)."""
        return {"loss": loss_sum / count, "accuracy": correct / count}

    def data_digest(self) -> str:
        """Hex digest of the rows of all splits that are read: all of them where there is
        training, else those that are scored."""
        return digest_of(*(f"{split}\0{self._open(split).table.digest}" for split in self.read))

    def contents(self) -> dict[str, dict[str, str]]:
        """Split -> the data set's name -> hex digest of its rows, of all that is read."""
        return {split: {self.source.name: self._open(split).table.digest} for split in self.read}

    def _open(self, split: str) -> Images:
        if split not in self.opened:
            self.opened[split] = self.source.open(split)
        return self.opened[split]

    def _config_values(self) -> dict[str, Any]:
        fresh = {} if self.model_section.path is not None else {"image_size": IMAGE_SIZE}
        return {"num_labels": len(self.source.classes), **fresh}

    def _processor(self, config: Any) -> Any:
        section = self.model_section
        if section.path is not None:
            return load_image_processor(section.path, section.revision)
        return new_image_processor(_side(config.image_size))

    def _check_config(self, config: Any) -> None:
        # a processor that crops does so after it resizes: that is the size of what it makes
        size = getattr(self.processor, "crop_size", None) or self.processor.size
        produced = size.get("height") or size.get("shortest_edge")
        expected = _side(getattr(config, "image_size", None) or 0)
        if config.model_type in ("vit", "deit") and produced and expected and produced != expected:
            raise DataError(
                f"the image processor makes {produced} pixels a side but the model takes "
                f"{expected}; give the model's "
                "own preprocessor_config.json"
            )

    def _check_names(self, task: Any) -> None:
        for key, names in (
            ("train", [task.train]),
            ("eval", task.eval or []),
            ("exclude", task.exclude),
        ):
            for name in names:
                if name is not None and (name != self.source.name or key == "exclude"):
                    raise DataError(
                        f"task.{key} {name}: task.data {task.data} is one data set, "
                        f"'{self.source.name}'; remove it"
                    )


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)

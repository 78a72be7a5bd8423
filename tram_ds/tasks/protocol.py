"""What a task gives the rest of the system: a model, rows, and a forward pass that says how much it
counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from tram_ds.data.stream import Rows
from tram_ds.models.output import Batch, Output
from tram_ds.models.pretrained import load_model

Load = Callable[..., nn.Module]  # of tram_ds/models/pretrained.py: load_model or load_stored


class Task(Protocol):
    """One module per task under tram_ds/tasks, found by name; tasks import neither engines nor
    algorithms.

    A task may have more, each asked for where it is there: said() (what was read, for the log and
    results.json), examine(model) (before the first step, collective: DataError where batches do not
    mean to the model what they should), prompt(text) and ends() (ids before and at the end of a
    sample), tokenizer or processor (saved beside an export).
    """

    noise_site: Literal["embedding", "pixel_values"]  # where x + z adds its noise
    classification: bool  # mmd needs it: one position per example

    def model(self, load: Load = load_model) -> nn.Module:
        """The model on CPU in fp32, in train mode; weights from `model.path` or freshly initialised
        from `model.init`. load: load_stored leaves them in their files, or undrawn."""
        ...

    def train_rows(self) -> Rows:
        """Training rows, addressable by index; the order they are read in belongs to
        data/order.py. Or a data.stream.Stream, which has its own."""
        ...

    def eval_sets(self, split: Literal["validation", "test"]) -> Mapping[str, Sequence[Any]]:
        """Domain or language name -> rows. The training domain comes first."""
        ...

    def collate(self, rows: Sequence[Any]) -> Batch:
        """CPU tensors of one micro-batch."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """Calls `model` once. Never changes `batch`."""
        ...

    def chunked(self, model: nn.Module) -> Callable[..., Output] | None:
        """The same without whole logits (tram_ds.models.chunked.Chunked), or None where they are
        small or the model cannot."""
        ...

    def counts(self, batch: Batch) -> tuple[int, int]:
        """(counted targets, valid positions) of a batch, from its tensors alone: what forward will
        report."""
        ...

    def row_sums(self, output: Output, batch: Batch) -> Tensor:
        """(B, 3) fp64: loss sum, count, and how many targets are predicted correctly (0 where
        accuracy means nothing) of every row of an evaluation batch."""
        ...

    def metrics(self, loss_sum: float, count: float, correct: float) -> dict[str, float]:
        """The task's metrics of one domain from its global sums, e.g. {"loss": .., "perplexity":
        ..}."""
        ...

    def data_digest(self) -> str:
        """Hex digest of all that is read: another one is other data, for a resume too."""
        ...

    def contents(self) -> dict[str, dict[str, str]]:
        """Split -> domain -> hex digest of what is read there, which other runs may share."""
        ...

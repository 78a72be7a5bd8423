"""Scores a model on every domain, over all ranks, with one reduction per domain.

Communication: every rank calls `model` the same number of times, in the same order, whatever its
share of the rows, so that the collectives inside a sharded model match; then `data_sum` once per
domain. All ranks get the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tram_ds.evaluation import row_scores
from tram_ds.evaluation.row_scores import RowScores, number_of
from tram_ds.runtime.errors import DataError
from tram_ds.tasks.protocol import Task

Batches = list[tuple[list[int], int]]  # (row indices, weight): 0 where nothing is counted


def evaluate(
    model: nn.Module,
    task: Task,
    rows_by_domain: Mapping[str, Sequence[Any]],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    data_sum: Callable[[Tensor], Tensor] = lambda x: x,
    progress: Callable[[str, int, int], None] | None = None,
    kept: Callable[[str, RowScores], None] | None = None,
) -> dict[str, dict[str, float]]:
    """domain -> the task's metrics, in the order of `rows_by_domain`; independent of batch size and
    world size.

    batch_size: rows of one forward pass on one rank. data_sum: sum over ranks of a (rows, 4) fp64
    tensor on `device`.
    progress: called as (domain, batches done, batches in all of this rank) after every batch.
    kept: takes the scores of every row of a domain, on every rank.
    """
    results = {}
    # .module: a wrapper such as DDP has the head below it
    forward = task.chunked(getattr(model, "module", model)) or task.forward
    with torch.no_grad(), evaluation_mode(model):
        for domain, rows in rows_by_domain.items():
            if not len(rows):
                raise DataError(f"domain '{domain}' has no rows to evaluate")
            batches = _batches(len(rows), batch_size, rank, world_size)
            told = None if progress is None else partial(progress, domain)
            table = _table(
                partial(forward, model),
                task,
                rows,
                batches,
                world_size,
                torch.device(device),
                told,
                kept is not None,
            )
            # of whole rows, not of sums: each rank's rows are zero on the others
            whole = data_sum(table).cpu()
            # summed over rows in their order: batches and ranks change nothing
            results[domain] = task.metrics(*whole[:, :3].sum(0).tolist())
            if kept is not None:
                kept(domain, row_scores.of(whole.numpy(), "accuracy" in results[domain]))
    return results


def _table(
    forward: Callable[[dict[str, Tensor]], Any],
    task: Task,
    rows: Sequence[Any],
    batches: Batches,
    world_size: int,
    device: torch.device,
    told: Callable[[int, int], None] | None,
    numbered: bool,
) -> Tensor:
    """(rows, 4) fp64 on `device`: of every row of this rank its loss sum, count, correct and, where
    numbered, number_of it; zero in those of other ranks."""
    # float64: losses of many rows are added up, and a number has 48 bits
    table = torch.zeros(len(rows), 4, dtype=torch.float64, device=device)
    numbers = torch.zeros(len(rows), dtype=torch.float64)
    for done, (indices, weight) in enumerate(batches, start=1):
        read = [rows[i] for i in indices]
        batch = {k: v.to(device) for k, v in task.collate(read).items()}
        output = forward(batch)
        # a rank out of rows has run the model for its collectives alone
        if weight:
            mine = slice(indices[0], indices[-1] + 1, world_size)
            table[mine, :3] = task.row_sums(output, batch)
            if numbered:
                numbers[mine] = torch.tensor([number_of(row) for row in read]).double()
        if told is not None:
            told(done, len(batches))
    # once a domain, not once a batch: each copy to the device would wait
    table[:, 3] = numbers.to(device)
    return table


def zero_shot_average(
    results: Mapping[str, Mapping[str, float]], train_domain: str | Iterable[str], metric: str
) -> float:
    """Unweighted mean of a metric over the domains that were not trained on; NaN if there are
    none."""
    trained = {train_domain} if isinstance(train_domain, str) else set(train_domain)
    values = [scores[metric] for domain, scores in results.items() if domain not in trained]
    # each divided first: a sum of perplexities near the largest float would be none
    return math.fsum(value / len(values) for value in values) if values else math.nan


def _batches(num_rows: int, batch_size: int, rank: int, world_size: int) -> Batches:
    """(row indices, weight) of each batch of a rank, as many on every rank; one out of rows repeats
    a row, weight 0."""
    if batch_size < 1:
        raise ValueError(f"evaluation batch size {batch_size}: at least 1 is needed")
    mine = list(range(rank, num_rows, world_size))
    # of the rank with most rows: all run as many batches as that one
    largest_share = math.ceil(num_rows / world_size)
    starts = range(0, largest_share, batch_size)
    return [(share, 1) if (share := mine[i : i + batch_size]) else ([0], 0) for i in starts]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and each module's own mode again after, also on error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

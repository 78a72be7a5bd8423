"""Evaluation over ranks: every row once, the same number of forward passes everywhere, modes given
back."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from tram_ds.evaluation.score import evaluate, zero_shot_average
from tram_ds.models.output import Output
from tram_ds.runtime.errors import DataError


class CountingModel(torch.nn.Module):
    """Squares its input and counts its calls."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        return self.dropout(x) ** 2


class SquareTask:
    """A row is a number; its loss is its square, and it is correct if it is even."""

    def collate(self, rows):
        return {"x": torch.tensor(rows, dtype=torch.float32)}

    def chunked(self, model):
        return None

    def forward(self, model, batch):
        loss = model(batch["x"])
        return Output(loss.sum(), len(loss), loss[:, None])

    def correct(self, output, batch):
        return (batch["x"] % 2 == 0).sum()

    def metrics(self, loss_sum, count, correct):
        return {"loss": loss_sum / count, "accuracy": correct / count, "count": count}


ROWS = {"a": list(range(1, 8)), "b": [3], "c": list(range(20))}
EXPECTED = {
    name: {
        "loss": sum(x * x for x in rows) / len(rows),
        "accuracy": sum(x % 2 == 0 for x in rows) / len(rows),
        "count": len(rows),
    }
    for name, rows in ROWS.items()
}


def evaluate_on_ranks(world_size, batch_size):
    """Each rank a thread; data_sum a barrier, so that a rank with another number of reductions
    would hang it."""
    barrier = threading.Barrier(world_size, timeout=30)
    slots, results = [torch.zeros(3, dtype=torch.float64)] * world_size, [{}] * world_size
    models = [CountingModel() for _ in range(world_size)]

    def run(rank):
        def data_sum(x):
            assert x.dtype == torch.float64 and x.shape == (3,)
            slots[rank] = x
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        results[rank] = evaluate(
            models[rank], SquareTask(), ROWS, batch_size, rank, world_size, data_sum=data_sum
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, [model.calls for model in models]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_rank_gets_the_same_result_and_calls_the_model_equally_often(world_size, batch_size):
    results, calls = evaluate_on_ranks(world_size, batch_size)
    assert all(result == EXPECTED for result in results)
    shares = [math.ceil(len(rows) / world_size) for rows in ROWS.values()]
    assert calls == [sum(math.ceil(share / batch_size) for share in shares)] * world_size


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_gets_its_modes_back_also_after_an_error(mode):
    model = CountingModel().train(mode)
    model.dropout.eval()
    evaluate(model, SquareTask(), ROWS, 4)
    assert model.training is mode and not model.dropout.training
    with pytest.raises(DataError, match="domain 'none' has no rows"):
        evaluate(model, SquareTask(), {"none": []}, 4)
    assert model.training is mode and torch.is_grad_enabled()


def test_progress_is_told_after_every_batch():
    told = []
    evaluate(
        CountingModel(), SquareTask(), {"a": ROWS["a"]}, 3, progress=lambda *args: told.append(args)
    )
    assert told == [("a", 1, 3), ("a", 2, 3), ("a", 3, 3)]


def test_a_task_may_score_by_its_own_rule():
    class Doubled(SquareTask):
        def evaluation_sums(self, output, batch):
            return torch.stack(
                [
                    2 * output.loss_sum.double(),
                    torch.tensor(1.0).double(),
                    torch.tensor(0.0).double(),
                ]
            )

    assert evaluate(CountingModel(), Doubled(), {"b": [3]}, 4)["b"] == {
        "loss": 18.0,
        "accuracy": 0.0,
        "count": 1.0,
    }


def test_zero_shot_average_is_the_plain_mean_without_the_training_domains():
    results = {"math": {"p": 100.0}, "art": {"p": 2.0}, "bio": {"p": 4.0}}
    assert zero_shot_average(results, "math", "p") == 3.0
    assert zero_shot_average(results, ["math", "art"], "p") == 4.0
    assert math.isnan(zero_shot_average(results, results, "p"))


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch size 0"):
        evaluate(CountingModel(), SquareTask(), ROWS, 0)


def test_an_average_of_the_largest_floats_is_one():
    results = {"home": {"p": 1.0}, "a": {"p": 1.5e308}, "b": {"p": 1.5e308}}
    assert zero_shot_average(results, "home", "p") == pytest.approx(1.5e308)
    assert zero_shot_average(results | {"b": {"p": math.inf}}, "home", "p") == math.inf

"""Evaluation over ranks: every row once, the same number of forward passes everywhere, modes given
back."""

from __future__ import annotations

import copy
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tram_ds.evaluation import row_scores
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

    def row_sums(self, output, batch):
        x = batch["x"].double()
        return torch.stack([x**2, torch.ones_like(x), (x % 2 == 0).double()], 1)

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


def evaluate_on_ranks(world_size, batch_size, kept=None):
    """Each rank a thread; data_sum a barrier, so that a rank with another number of reductions
    would hang it."""
    barrier = threading.Barrier(world_size, timeout=30)
    slots, results = [torch.zeros(3, dtype=torch.float64)] * world_size, [{}] * world_size
    models = [CountingModel() for _ in range(world_size)]

    def run(rank):
        def data_sum(x):
            assert x.dtype == torch.float64 and x.shape[1:] == (4,)
            slots[rank] = x
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        results[rank] = evaluate(
            models[rank],
            SquareTask(),
            ROWS,
            batch_size,
            rank,
            world_size,
            data_sum=data_sum,
            kept=None if kept is None else kept[rank].__setitem__,
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


def test_every_row_is_kept_once_in_order_whatever_the_ranks():
    """By hand: which numbers are even; the same bytes on 1, 2, 3 and 5 ranks, where the last ones
    have fewer rows or none, and in any batches."""
    made = set()
    for world_size, batch_size in ((1, 1), (1, 100), (2, 4), (3, 4), (5, 2)):
        for rows in kept_on_ranks(world_size, batch_size):
            assert {name: of.value.tolist() for name, of in rows.items()} == {
                name: [int(x % 2 == 0) for x in numbers] for name, numbers in ROWS.items()
            }
            made.add(row_scores.packed({"test": rows}))
    assert len(made) == 1
    assert all(of.score == EXPECTED[name]["accuracy"] for name, of in rows.items())


def kept_on_ranks(world_size, batch_size):
    found = [{} for _ in range(world_size)]
    evaluate_on_ranks(world_size, batch_size, found)
    return found


def test_rows_are_known_by_their_content_and_order(tmp_path):
    def digest(rows):
        kept = {}
        evaluate(CountingModel(), SquareTask(), {"a": rows}, 2, kept=kept.__setitem__)
        return kept["a"].digest

    assert digest([1, 2, 3]) == digest([1, 2, 3])
    assert len({digest(rows) for rows in ([1, 2, 3], [1, 3, 2], [1, 2], [1, 2, 4])}) == 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c", 1), ("a", "bc", 1)),
        (("a", "b", 1), ("a", "b", 2)),
        (np.arange(4), np.arange(4).astype(np.int32)),
        ((np.arange(3), np.ones(3, bool)), (np.arange(3), np.zeros(3, bool))),
        (("a", ("b", "c")), (("a", "b"), "c")),
        (Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))),
    ],
)
def test_rows_of_other_content_have_other_numbers(one, other):
    assert row_scores.number_of(one) == row_scores.number_of(copy.deepcopy(one))
    assert row_scores.number_of(one) != row_scores.number_of(other)
    assert 0 <= row_scores.number_of(one) < 2**48


def test_what_is_kept_is_read_again(tmp_path):
    """Losses and counts too, and a domain with a name of a path; accuracies are small."""
    losses = np.column_stack([[1.5, 0.25], [3.0, 2.0], [0.0, 0.0], [7.0, 2.0**48 - 1]])
    kept = {"test": {"wiki/art": row_scores.of(losses, False), "b": row_scores.of(losses, True)}}
    (tmp_path / "rows.npz").write_bytes(row_scores.packed(kept))
    found = row_scores.read(tmp_path / "rows.npz")
    for domain, of in kept["test"].items():
        again = found["test"][domain]
        assert (again.value == of.value).all() and (again.weight == of.weight).all()
        assert again.digest == of.digest and again.value.dtype == of.value.dtype
    assert found["test"]["wiki/art"].score == pytest.approx(1.75 / 5)
    assert found["test"]["b"].score == 0.0
    small = {"test": {"c": row_scores.of(np.tile([9.0, 1.0, 1.0, 5.0], (10_000, 1)), True)}}
    assert len(row_scores.packed(small)) < 2000
    (tmp_path / "rows.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"rows\.npz: cannot be read"):
        row_scores.read(tmp_path / "rows.npz")


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

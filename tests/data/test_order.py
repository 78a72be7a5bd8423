"""The data order: permutations of (seed, epoch), read straight through, the same for everyone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tram_ds.data.order import batch_indices, epoch_permutation


def test_every_epoch_is_a_permutation_and_epochs_differ():
    epochs = [epoch_permutation(7, epoch, 101).tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(101)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4
    assert epoch_permutation(8, 0, 101).tolist() != epochs[0]


# divides, straddles, equals and exceeds the 10 rows
@pytest.mark.parametrize("global_batch", [1, 4, 10, 23])
def test_batches_read_the_concatenated_epochs_in_order(global_batch):
    concatenated = [row for epoch in range(12) for row in epoch_permutation(3, epoch, 10).tolist()]
    steps = len(concatenated) // global_batch
    read = [row for step in range(steps) for row in batch_indices(3, step, global_batch, 10)]
    assert read == concatenated[: steps * global_batch]


def test_a_step_needs_no_earlier_step():
    straight = [batch_indices(1, step, 6, 1000) for step in range(400)]
    epoch_permutation.cache_clear()
    assert batch_indices(1, 399, 6, 1000) == straight[399]


def test_ranks_that_split_the_list_read_it_all():
    whole = batch_indices(0, 5, 12, 50)
    halves = [batch_indices(0, 5, 12, 50)[rank * 6 : (rank + 1) * 6] for rank in range(2)]
    assert halves[0] + halves[1] == whole


def test_another_process_reads_the_same():
    code = "from tram_ds.data.order import batch_indices; print(batch_indices(5, 17, 8, 30))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(batch_indices(5, 17, 8, 30))


@pytest.mark.parametrize("step, global_batch, num_rows", [(0, 4, 0), (0, 0, 5), (-1, 2, 5)])
def test_impossible_requests_are_refused(step, global_batch, num_rows):
    with pytest.raises(ValueError, match=r"at least 1|must be >="):
        batch_indices(0, step, global_batch, num_rows)

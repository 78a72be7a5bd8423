"""The order in which training rows are read: a pure function of (seed, step), the same at any world
size.

Nothing is ever stored: a resumed run asks for step t and gets the rows an uninterrupted run would
have read.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_WORD = (1 << 64) - 1


@lru_cache(maxsize=2)  # a batch that straddles two epochs needs both
def epoch_permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """(num_rows,) int64 permutation of the rows in one epoch, read-only.

    Sorts raw Philox words keyed by (seed, epoch): numpy promises that raw words never change
    between its versions, and makes no such promise for `Generator.permutation`.
    """
    words = np.random.Philox(
        key=np.array([seed & _WORD, epoch & _WORD], dtype=np.uint64)
    ).random_raw(num_rows)
    # stable: should two words be equal, their order is no version's choice either
    order = np.argsort(words, kind="stable").astype(np.int64)
    # it stays in the cache: who changed it would change it for all
    order.flags.writeable = False
    return order


def batch_indices(seed: int, step: int, global_batch: int, num_rows: int) -> list[int]:
    """Row indices of the global batch of `step` (0-based): `global_batch` of them, each in [0,
    num_rows).

    They are positions [step * global_batch, (step + 1) * global_batch) of the concatenated epoch
    permutations, so a batch may straddle epochs and no row is ever dropped. Ranks take their share
    of this list; it does not know them.
    """
    if num_rows < 1:
        raise ValueError(f"the training data has {num_rows} rows; at least 1 is needed")
    if global_batch < 1 or step < 0:
        raise ValueError(
            f"step {step} with global_batch {global_batch}: step must be >= 0 and global_batch >= 1"
        )
    position, end = step * global_batch, (step + 1) * global_batch
    indices: list[int] = []
    while position < end:
        epoch, start = divmod(position, num_rows)
        stop = min(num_rows, start + end - position)
        indices.extend(epoch_permutation(seed, epoch, num_rows)[start:stop].tolist())
        position += stop - start
    return indices

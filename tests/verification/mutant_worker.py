"""tests.parity.kit_worker with engines that never publish theta + epsilon."""

from __future__ import annotations

import functools
import sys

from tests.parity import kit_worker
from tests.parity.mutants import epsilon_not_published

if __name__ == "__main__":
    kit_worker.compare = functools.partial(kit_worker.compare, mutate=epsilon_not_published)
    kit_worker.main(*sys.argv[1:])

"""Whether all ranks of a job run one recipe with one code: nodes may have files of their own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tram_ds.recipe.recipe import Recipe, to_dict
from tram_ds.runtime.errors import DataError
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.redact import redact
from tram_ds.runtime.wording import short

OWN = ("task.cache_dir",)  # may be a folder of each node's own
LIBRARIES = ("torch", "transformers")


def refuse_other_recipes(recipe: Recipe, world_size: int) -> None:
    """DataError on every rank, naming the key and a rank, where one has another recipe, other code
    of this library, or another version of torch or transformers. Collective, inside a process
    group where the job has several ranks."""
    if world_size == 1:
        return
    peers = Peers(world_size)
    try:
        all_ = peers.gather((os.uname().nodename, {**_flat(to_dict(recipe)), **_code()}))
    finally:
        peers.close()
    there, first = all_[0]
    for rank, (node, own) in enumerate(all_):
        for key in sorted(first | own):
            one, other = own.get(key, "unset"), first.get(key, "unset")
            if key not in OWN and one != other:
                text = (
                    f"not all ranks run the same: {key} {short(one)} for rank {rank} on {node}, "
                    f"{short(other)} for rank 0 on {there}: give all nodes the same recipe, "
                    "command line and environment"
                )
                raise DataError(redact(text))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        found |= _flat(item, f"{name}.") if isinstance(item, Mapping) and item else {name: item}
    return found


@cache
def _code() -> dict[str, str]:
    """What computes: the sources of this library by their digest, others by their version."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    # sorted: rglob's order is that of the file system, which nodes differ in
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"the code of tram_ds (sha256)": digest.hexdigest()[:12], **versions}

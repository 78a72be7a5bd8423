"""The data of a run as an MLflow dataset input: found by its digest, never uploaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tram_ds.recipe.task_section import TaskSection

# characters MLflow stores; the whole one is in the profile and in the tag data_digest
MAX_DIGEST = 36
MADE_HERE = ("generated", "installed_docs")


def dataset(
    task: TaskSection, digest: str, train: Sequence[str], scored: Sequence[str]
) -> dict[str, str]:
    """The fields of mlflow.entities.Dataset. digest: of all the text, pairs or images the run
    reads."""
    folder = Path(task.data)
    if task.data in MADE_HERE:
        kind, source = "code", {"tags": {"task.data": task.data}}
    elif folder.exists():
        kind, source = "local", {"uri": str(folder.resolve())}
    else:
        kind, source = "hugging_face", {"path": task.data, "revision": task.revision}
    profile = {"sha256": digest, "train_domains": list(train), "eval_domains": list(scored)}
    return {
        "name": f"{task.data}/{'+'.join(train)}"[:500],
        "digest": digest[:MAX_DIGEST],
        "source_type": kind,
        "source": json.dumps(source),
        "profile": json.dumps(profile),
    }

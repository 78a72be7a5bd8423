"""model.compile: the same training from compiled blocks, on one process and sharded, in few graphs
without a break."""

from __future__ import annotations

import pytest
from transformers import AutoModelForImageClassification

from tests import ranks
from tram_ds.models.pretrained import GRAPHS, load_model
from tram_ds.recipe.model_section import ModelSection
from tram_ds.runtime.errors import DataError


def test_a_model_without_blocks_is_refused() -> None:
    init = {"architecture": "resnet", "depths": [1], "hidden_sizes": [8], "embedding_size": 8}
    section = ModelSection(init=init, attention="eager", compile=True)
    with pytest.raises(DataError, match=r"ResNetForImageClassification.*remove model.compile"):
        load_model(AutoModelForImageClassification, section, num_labels=2)


@pytest.mark.slow
@pytest.mark.parametrize("engine, world", [("single", 1), ("fsdp2", 2)])
def test_compiled_blocks_train_the_same(engine: str, world: int) -> None:
    """fp32, dropout 0: the order of additions is all that may differ. Two train graphs, the rest
    are evaluation's shapes."""
    rows = ranks.run("tests.models.compile_worker", engine, world=world)
    for case in ("checkpointing=False", "checkpointing=True"):
        row = rows[case]
        assert row["error"] < 1e-5 < row["moved"] / 5, (case, row)
        assert row["names"] and row["breaks"] == 0, (case, row)
        assert 3 <= row["graphs"] <= 10 < GRAPHS, (case, row)
    first, second = rows["dropout"]
    assert first == 0.0 < second, "without a gradient the masks are those of the pass with one"

"""What a parent run shows of its seeds: shared parameters, mean, deviation and number, whatever the
order they end in, fail or are run again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.tracking.test_tracking import begin, server, write_steps
from tram_ds.tracking import group
from tram_ds.tracking.server import runs_page
from tram_ds.tracking.state import LEFT_TAG, NOTE, PARENT, load

NAME = "final/test/near/perplexity"
RECIPE = {"algorithm": {"name": "sam", "rho": 0.05}, "train": {"steps": 3}}


def start(folder: Path, uri: str, seed: int, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "experiment": folder.parent.name,
        "parent_name": "made-sam",
        "run_name": f"made-sam-{seed}",
        "params": {**RECIPE, "train": {"steps": 3, "seed": seed}},
        "shared": RECIPE,
        "tags": {"engine": "fsdp2", "world_size": 2, "recipe": "made"},
        "dataset": {"name": "animals", "digest": "1", "source_type": "local", "source": "x"},
        "note": f"seed {seed}",
    }
    return begin(folder, uri, **(given | changes))


def end(tracker: Any, score: float, status: str = "FINISHED") -> None:
    scores = {"test": {"home": {"perplexity": 1.0}, "near": {"perplexity": score}}}
    if status == "FINISHED":
        tracker.log_results({"scores": scores, "train_domains": ["home"], "initial": None})
    assert tracker.finish(status)


def parent_of(uri: str, tracker: Any) -> Any:
    return server(uri).get_run(server(uri).get_run(tracker.run_id).data.tags[PARENT])


def numbers(uri: str, tracker: Any) -> tuple[float, ...]:
    found = parent_of(uri, tracker).data.metrics
    kinds = ("final", "final_std", "final_n")
    return tuple(found[_key(kind)] for kind in kinds if _key(kind) in found)


def _key(kind: str) -> str:
    return NAME.replace("final/", f"{kind}/")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database, as a new one takes seconds; an experiment for every test."""
    return f"sqlite:///{tmp_path_factory.mktemp('group')}/mlflow.db"


def test_a_parent_carries_mean_deviation_and_number(tmp_path: Path, uri: str) -> None:
    """10, then 10 and 14, then a failed one that says nothing: 12, deviation sqrt(8), 2 seeds."""
    first = start(tmp_path / "0", uri, 0)
    write_steps(tmp_path / "0", range(3), seconds=600.0)
    end(first, 10.0)
    assert numbers(uri, first) == (10.0, 1.0)  # one seed has no deviation
    end(start(tmp_path / "1", uri, 1, tags={"engine": "zero3"}), 14.0)
    end(start(tmp_path / "2", uri, 2), 0.0, "FAILED")
    assert numbers(uri, first) == pytest.approx((12.0, math.sqrt(8), 2))
    parent = parent_of(uri, first)
    assert parent.data.metrics["cost/rank_hours"] == pytest.approx(1.0)  # 3 x 600 s on 2 ranks
    assert parent.data.params == {
        "algorithm.name": "sam",
        "algorithm.rho": "0.05",
        "train.steps": "3",
    }
    told = parent.data.tags
    assert (told["engine"], told["seeds"], told["recipe"]) == ("fsdp2, zero3", "0, 1, 2", "made")
    assert [found.dataset.name for found in parent.inputs.dataset_inputs] == ["animals"]
    assert f"tram compare --experiment {tmp_path.name} " in told[NOTE]
    assert server(uri).get_run(first.run_id).data.tags[NOTE] == "seed 0"


def test_a_seed_that_is_run_again_counts_once(tmp_path: Path, uri: str) -> None:
    first = start(tmp_path / "0", uri, 0)
    end(first, 10.0)
    end(start(tmp_path / "1", uri, 1), 14.0)
    end(start(tmp_path / "again", uri, 0), 20.0)
    assert numbers(uri, first) == pytest.approx((17.0, math.sqrt(18), 2))


def test_a_run_that_goes_on_and_fails_no_longer_counts(tmp_path: Path, uri: str) -> None:
    first = start(tmp_path / "0", uri, 0)
    end(first, 10.0)
    second = start(tmp_path / "1", uri, 1)
    end(second, 14.0)
    end(start(tmp_path / "1", uri, 1), 0.0, "FAILED")
    found = parent_of(uri, first).data.metrics
    assert found[NAME] == 10.0 and found[_key("final_n")] == 1
    assert math.isnan(found[_key("final_std")])  # instead of that of two


def test_a_deleted_seed_leaves_the_mean(tmp_path: Path, uri: str) -> None:
    trackers = [start(tmp_path / str(seed), uri, seed) for seed in range(3)]
    end(trackers[0], 10.0)
    end(trackers[1], 14.0)
    server(uri).delete_run(trackers[1].run_id)
    end(trackers[2], 16.0)
    assert numbers(uri, trackers[0]) == pytest.approx((13.0, math.sqrt(18), 2))


def test_a_way_that_was_left_is_no_seed(tmp_path: Path, uri: str) -> None:
    trackers = [start(tmp_path / str(seed), uri, seed) for seed in (0, 1)]
    end(trackers[0], 10.0)
    end(trackers[1], 14.0)
    server(uri).set_tag(trackers[0].run_id, LEFT_TAG, "another")
    end(start(tmp_path / "2", uri, 2), 16.0)
    assert numbers(uri, trackers[0]) == pytest.approx((15.0, math.sqrt(2), 2))


def test_whoever_saw_less_does_not_overrule(tmp_path: Path, uri: str) -> None:
    """A job that read the seeds before the other one ended, and writes after it."""
    first, second = (start(tmp_path / str(seed), uri, seed) for seed in (0, 1))
    end(first, 10.0)
    client, state = server(uri), load(tmp_path / "0")
    assert state is not None
    seen = [client.get_run(first.run_id)]
    end(second, 14.0)
    parent = parent_of(uri, first)
    client.log_batch(parent.info.run_id, metrics=group.summary(seen))
    assert numbers(uri, first) == pytest.approx((12.0, math.sqrt(8), 2))
    before = client.get_metric_history(parent.info.run_id, NAME)
    group.refresh(client, client.get_run(first.run_id), state)
    assert client.get_metric_history(parent.info.run_id, NAME) == before  # again: nothing new


def test_other_parameters_are_another_parent(tmp_path: Path, uri: str) -> None:
    """Means over different rho would be the means of nothing."""
    one = start(tmp_path / "one", uri, 0)
    other = start(tmp_path / "other", uri, 0, shared={"algorithm": {"name": "sam", "rho": 0.1}})
    end(one, 10.0)
    end(other, 20.0)
    assert numbers(uri, one) == (10.0, 1.0) and numbers(uri, other) == (20.0, 1.0)
    assert parent_of(uri, other).data.params["algorithm.rho"] == "0.1"


def test_other_data_is_another_parent(tmp_path: Path, uri: str) -> None:
    """The same recipe, whose file of text has changed between two seeds."""
    one, other = (
        start(tmp_path / name, uri, seed, tags={"data_digest": name})
        for seed, name in enumerate(("aaa", "bbb"))
    )
    end(one, 10.0)
    end(other, 20.0)
    assert numbers(uri, one) == (10.0, 1.0) and numbers(uri, other) == (20.0, 1.0)


def test_what_people_wrote_into_the_description_stays(tmp_path: Path, uri: str) -> None:
    first = start(tmp_path / "0", uri, 0)
    end(first, 10.0)
    parent = parent_of(uri, first)
    server(uri).set_tag(parent.info.run_id, NOTE, "mine")
    server(uri).set_tag(first.run_id, NOTE, "mine")
    end(start(tmp_path / "0", uri, 0), 11.0)
    assert parent_of(uri, first).data.tags[NOTE] == "mine"
    assert server(uri).get_run(first.run_id).data.tags[NOTE] == "mine"


@pytest.mark.parametrize(
    ("uri", "number", "page"),
    [
        (
            "http://tracking:5000/",
            "3",
            "http://tracking:5000/#/experiments/3/runs?workflowType=machine_learning",
        ),
        (
            "sqlite:////data/mlflow.db",
            "3",
            "mlflow ui --backend-store-uri sqlite:////data/mlflow.db, then "
            "http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning",
        ),
        (
            "sqlite:////data/mlflow.db",
            None,
            "sqlite:////data/mlflow.db  (mlflow ui --backend-store-uri sqlite:////data/mlflow.db)",
        ),
        ("http://name:word@tracking", None, "http://<redacted>@tracking"),
        (
            "postgresql://me:word@db/mlflow",
            "3",
            "mlflow ui --backend-store-uri 'postgresql://<redacted>@db/mlflow', then "
            "http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning",
        ),
        (
            "file:///data/runs",
            None,
            "file:///data/runs  (mlflow ui --backend-store-uri file:///data/runs)",
        ),
        ("databricks", None, "databricks"),
        ("databricks://profile", "3", "databricks://profile, experiment 3"),
    ],
)
def test_where_the_runs_are_looked_at(uri: str, number: str | None, page: str) -> None:
    assert runs_page(uri, number) == page

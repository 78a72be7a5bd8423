"""Where a run is tracked: recipe over environment, every variable honoured or named as not used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tram_ds.tracking.address import address, sqlite_path, sqlite_uri
from tram_ds.tracking.server import prepare_environment

SERVER = {"MLFLOW_TRACKING_URI": "http://server:5000"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path.cwd()


def found(env, uri=None, experiment=None):
    return address(uri, experiment, "recipe", env)


def test_without_a_word_it_is_a_database_in_this_folder(here):
    at = found({})
    assert (at.uri, at.experiment, at.by_id) == (f"sqlite:///{here}/mlflow.db", "recipe", False)
    assert at.told == f"MLflow at {at.uri}, experiment recipe"


@pytest.mark.parametrize(
    ("env", "recipe", "expected"),
    [
        (SERVER, {}, ("http://server:5000", "recipe", False)),
        ({"MLFLOW_EXPERIMENT_NAME": "thesis"}, {}, (None, "thesis", False)),
        ({"MLFLOW_EXPERIMENT_ID": "77"}, {}, (None, "77", True)),
        (
            {"MLFLOW_EXPERIMENT_ID": "77", "MLFLOW_EXPERIMENT_NAME": "a"},
            {},
            (None, "a", False),  # MLflow's own order
        ),
        (SERVER, {"uri": "http://mine:1"}, ("http://mine:1", "recipe", False)),
        ({"MLFLOW_EXPERIMENT_ID": "77"}, {"experiment": "mine"}, (None, "mine", False)),
        ({"MLFLOW_TRACKING_URI": "  "}, {}, (None, "recipe", False)),
        ({"MLFLOW_TRACKING_URI": "databricks"}, {}, ("databricks", "recipe", False)),
    ],
)
def test_the_recipe_comes_before_the_environment(here, env, recipe, expected):
    at = found(env, **recipe)
    uri, *rest = expected
    assert (at.uri, at.experiment, at.by_id) == (uri or f"sqlite:///{here}/mlflow.db", *rest)


def test_a_relative_database_is_of_this_folder_wherever_sync_runs(here):
    assert found({"MLFLOW_TRACKING_URI": "sqlite:///a/b.db?x=1"}).uri == (
        f"sqlite:///{here}/a/b.db?x=1"
    )


def test_one_line_says_where_from_and_what_is_not_used():
    env = {**SERVER, "MLFLOW_EXPERIMENT_NAME": "thesis", "MLFLOW_RUN_ID": "0" * 32}
    assert found(env).told == (
        "MLflow at http://server:5000 (MLFLOW_TRACKING_URI), experiment thesis "
        "(MLFLOW_EXPERIMENT_NAME); not used: MLFLOW_RUN_ID"
    )
    assert found(env, "http://mine:1", "mine").told == (
        "MLflow at http://mine:1 (tracking.uri), experiment mine (tracking.experiment); not used: "
        "MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID"
    )


def test_a_password_in_the_variable_is_used_and_not_said():
    at = found({"MLFLOW_TRACKING_URI": "http://me:canary@server"})
    assert at.uri == "http://me:canary@server" and "canary" not in at.told


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("/a b/[x]#1/100%/mlflow.db", "sqlite:////a b/[x]#1/100%/mlflow.db"),  # as it always was
        ("/a%20b/mlflow.db", "sqlite:////a%2520b/mlflow.db"),
        ("/a?b/mlflow.db", "sqlite:////a%3Fb/mlflow.db"),
        ("/a?b%/mlflow.db", "sqlite:////a%3Fb%25/mlflow.db"),
    ],
)
def test_a_database_uri_is_what_sqlalchemy_reads_as_that_file(path, uri):
    from sqlalchemy.engine import make_url

    assert sqlite_uri(Path(path)) == uri and sqlite_path(uri) == Path(path)
    assert make_url(uri).database == path


def test_a_relative_database_of_an_odd_folder(tmp_path, monkeypatch):
    (tmp_path / "a?b").mkdir()
    monkeypatch.chdir(tmp_path / "a?b")
    uri = found({"MLFLOW_TRACKING_URI": "sqlite:///x.db?y=1"}).uri
    assert uri == f"sqlite:///{tmp_path}/a%3Fb/x.db?y=1"
    assert sqlite_path(uri) == tmp_path / "a?b" / "x.db"


def test_telemetry_is_off_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"MLFLOW_DISABLE_TELEMETRY": "false"})
    prepare_environment()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"

"""Where a run is tracked: as the recipe says, else as MLflow's own environment variables say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from tram_ds.runtime.paths import expanded_uri
from tram_ds.runtime.redact import redact

URI, NAME, ID = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
OF_ONE_RUN = ("MLFLOW_RUN_ID", "MLFLOW_RUN_NAME")  # each run folder has a run of its own
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Address:
    """experiment: a name, or the number of an experiment that exists where `by_id`. told: where
    each came from, one line without secrets."""

    uri: str
    experiment: str
    by_id: bool
    told: str


def address(
    uri: str | None, experiment: str | None, default_experiment: str, env: Mapping[str, str]
) -> Address:
    """uri, experiment: the recipe's, which come before the environment's; without either it is
    mlflow.db in this folder and the default experiment."""
    set_ = {name: env.get(name, "").strip() for name in (URI, NAME, ID, *OF_ONE_RUN)}
    found, source = uri and expanded_uri(uri, "tracking.uri"), "tracking.uri" if uri else ""
    if not found and set_[URI]:
        found, source = absolute(expanded_uri(set_[URI], URI)), URI
    found = found or sqlite_uri(Path.cwd() / "mlflow.db")
    where = redact(found) + (f" ({source})" if source else "")
    name, of = experiment, "tracking.experiment" if experiment else ""
    if not name and (set_[NAME] or set_[ID]):
        name, of = (set_[NAME], NAME) if set_[NAME] else (set_[ID], ID)
    told = f"MLflow at {where}, experiment {redact(name or default_experiment)}"
    told += f" ({of})" if of else ""
    unused = [*([URI] if uri else []), *(v for v in (NAME, ID) if of and of != v), *OF_ONE_RUN]
    if ignored := [v for v in unused if set_[v]]:
        told += f"; not used: {', '.join(ignored)}"
    return Address(found, name or default_experiment, of == ID, told)


def absolute(uri: str) -> str:
    """A relative sqlite path is of the folder the command runs in; `sync` may run elsewhere."""
    path, question, query = uri.removeprefix(_SQLITE).partition("?")
    if not uri.startswith(_SQLITE) or Path(path).is_absolute():
        return uri
    return f"{_SQLITE}{Path(_quoted(Path.cwd())) / path}{question}{query}"


def sqlite_uri(database: Path) -> str:
    """The URI of a database file, by its absolute path."""
    return f"{_SQLITE}{_quoted(database)}"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI, else None."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0]))


def _quoted(path: Path) -> str:
    """The path as SQLAlchemy reads it from a URI: it ends at a `?`, and `%20` is a space. What says
    the same unquoted stays as the user knows it."""
    text = str(path)
    return (
        text.replace("%", "%25").replace("?", "%3F")
        if unquote(text) != text or "?" in text
        else text
    )

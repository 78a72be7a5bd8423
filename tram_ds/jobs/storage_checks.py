"""The doctor's checks of where a run writes: its folder, the disk, the tracking server."""

from __future__ import annotations

import os
import secrets
import shutil
import ssl
import urllib.error
import urllib.request

from tram_ds.jobs.check import Context, Problem, existing, size
from tram_ds.planning import states
from tram_ds.runtime.files import remove_file
from tram_ds.runtime.ranks import barrier
from tram_ds.runtime.redact import redact
from tram_ds.runtime.run_folder import refuse
from tram_ds.tracking.address import address, sqlite_path

SERVER_SECONDS = 3


def run_folder(context: Context) -> str:
    """A run may have the folder. Rank 0 writes a file in it, or in the one above; every rank, so
    every node, must be able to read it."""
    folder = existing(context.recipe.resolved_run_dir().absolute())
    word = secrets.token_hex(8) if context.job.rank == 0 else ""
    file = folder / ".tram_ds-doctor"
    problem = None
    try:
        if context.job.rank == 0:
            refuse(context.recipe.resolved_run_dir(), resume=True, overwrite=False)
            file.write_text(word)
    except ValueError as error:
        problem = Problem(str(error), "set run_dir to a folder that is new or a run's")
    except OSError as error:
        problem = Problem(
            f"{folder} cannot be written: {error.strerror}", "set run_dir to a folder of yours"
        )
    barrier()
    if problem is None and not file.is_file():
        where = f"rank {context.job.rank} on {os.uname().nodename}"
        problem = Problem(
            f"{folder}: {where} does not see what rank 0 wrote",
            "set run_dir to a file system all nodes share",
        )
    barrier()
    if context.job.rank == 0:
        remove_file(file)
    # after both barriers: a rank that raised before would leave the others in them
    if problem:
        raise problem
    return f"{folder} is writable" + (
        f" and shared by {context.job.world_size} ranks" if context.job.world_size > 1 else ""
    )


def disk(context: Context) -> str:
    """Room for the checkpoints: those kept and the one being written."""
    folder = existing(context.recipe.resolved_run_dir().absolute())
    one = states.checkpoint_bytes(context.recipe, context.parameters)
    needed, free = one * (context.recipe.checkpoint.keep + 1), shutil.disk_usage(folder).free
    found = (
        f"{size(free)} free, {context.recipe.checkpoint.keep} + 1 checkpoints of "
        f"{size(one)} need {size(needed)}"
    )
    if free < needed:
        raise Problem(
            found, "free some, set checkpoint.keep=1, or set run_dir to a larger file system"
        )
    return found


def tracking(context: Context) -> str:
    """The MLflow server answers, or the database's folder is writable."""
    section = context.recipe.tracking
    if not section.enabled:
        return "off"
    where = address(section.uri, section.experiment, context.recipe.name, os.environ)
    uri, shown = where.uri, redact(where.uri)
    database = sqlite_path(uri)
    if database is not None:
        if not os.access(existing(database.absolute().parent), os.W_OK):
            raise Problem(
                f"{shown}: the folder cannot be written",
                "set tracking.uri, or tracking.enabled=false",
            )
        return where.told
    if not uri.startswith(("http://", "https://")):
        return f"{where.told}: not asked, MLflow's own client knows the way"
    try:
        health = f"{uri.rstrip('/')}/health"
        with urllib.request.urlopen(health, timeout=SERVER_SECONDS, context=_tls()) as answer:
            answer.read(64)
    except (OSError, ValueError) as error:
        # 401 or 404 is an answer too: somebody is there
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            return f"{shown} answers ({error.code})"
        fix = (
            "start it, correct tracking.uri, or train anyway: launch/sync.py uploads the run later"
        )
        raise Problem(
            f"{shown} does not answer within {SERVER_SECONDS} s: {redact(str(error))}", fix
        ) from None
    return f"{where.told}: it answers"


def _tls() -> ssl.SSLContext:
    """What MLflow's client would trust."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return ssl._create_unverified_context()
    return ssl.create_default_context(
        cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None
    )

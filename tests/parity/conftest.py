"""What the oracle says, kept for the whole session: the workers of pytest-xdist share it."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of tests.parity.answers.kept_in."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "oracle"
    folder.mkdir(exist_ok=True)
    return str(folder)

"""The source archive of the builtin data set, where the environment names a copy."""

import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def archive():
    """Tests that take it are skipped where there is no copy."""
    path = os.environ.get("RLHF_JAX_VADER_SDIST")
    if not path:
        pytest.skip("RLHF_JAX_VADER_SDIST does not name a copy of the source archive")
    return pathlib.Path(path)

"""The source archive of the builtin data set, and a hub that is a folder."""

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


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The datasets library, quiet and with its cache in a place of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets

"""The tiny checkpoints of tests/fixtures/families, each loaded once."""

import functools
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.pretrained import Pretrained, load_pretrained
from rlhf_jax.models.transformer import Model, make_model

FAMILIES = pathlib.Path(__file__).parents[1] / "fixtures" / "families"
LANGUAGE_MODELS = sorted(
    folder.name for folder in FAMILIES.iterdir() if not folder.name.endswith("_score")
)
CLASSIFIERS = ["gpt2_score", "llama_score"]


class Fixture(NamedTuple):
    directory: pathlib.Path
    pretrained: Pretrained
    arrays: dict[str, np.ndarray]
    model: Model


def jitted(config: TransformerConfig, **settings) -> Model:
    """A model whose functions are compiled once, for all tests that share it."""
    model = make_model(config, **settings)
    return model._replace(
        init=jax.jit(model.init, static_argnames="head"),
        apply=jax.jit(model.apply),
        prefill=jax.jit(model.prefill, static_argnames="cache_length"),
        decode=jax.jit(model.decode),
        unstack=jax.jit(model.unstack),
    )


@functools.cache
def load_fixture(name):
    directory = FAMILIES / name
    with np.load(directory / "logits.npz") as arrays:
        arrays = dict(arrays)
    pretrained = load_pretrained(directory, head=None)
    return Fixture(directory, pretrained, arrays, jitted(pretrained.config))


@pytest.fixture(params=LANGUAGE_MODELS)
def family(request):
    """Each causal language model among the fixtures."""
    return load_fixture(request.param)


@pytest.fixture(params=CLASSIFIERS)
def classifier(request):
    """Each sequence classifier among the fixtures."""
    return load_fixture(request.param)


@pytest.fixture(params=LANGUAGE_MODELS + CLASSIFIERS)
def checkpoint(request):
    """Every fixture."""
    return load_fixture(request.param)


@pytest.fixture
def llama():
    """The plainest fixture."""
    return load_fixture("llama")

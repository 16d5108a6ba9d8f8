"""One tiny model and one batch of prompts for all tests of the rollout."""

import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.models.transformer import Model, make_model

LLAMA = pathlib.Path(__file__).parents[1] / "fixtures" / "families" / "llama"


class Setup(NamedTuple):
    model: Model
    params: dict
    prompts: np.ndarray  # [B, P], left-padded
    prompt_mask: np.ndarray


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Most of the time here is XLA's, and tiny arrays need no optimized code."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def llama() -> Setup:
    """The plainest fixture, and eight prompts of 1 to 6 tokens."""
    found = load_pretrained(LLAMA)
    lengths = np.array([6, 3, 1, 5, 4, 6, 2, 3])
    rng = np.random.default_rng(0)
    mask = np.arange(6) >= 6 - lengths[:, None]
    prompts = np.where(mask, rng.integers(3, 96, mask.shape), 0).astype(np.int32)
    return Setup(make_model(found.config), found.params, prompts, mask)

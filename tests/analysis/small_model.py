"""A model of two layers whose weights are drawn without compiling anything."""

import dataclasses

import jax
import numpy as np

from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.transformer import make_model
from tests.trainers.conftest import LLAMA


def small_model(**changes):
    return make_model(dataclasses.replace(config_from_hf(LLAMA), **changes))


def draw_params(model, seed):
    """Weights like those of a fresh model: norms near 1, kernels near 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(0.0, 0.1, leaf.shape) + (path[-1].key == "scale")
        return x.astype(np.float32)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(model.init, jax.random.key(0))
    )

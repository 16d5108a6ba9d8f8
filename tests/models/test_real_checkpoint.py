"""SmolLM2-135M-Instruct against transformers; needs the weights.

RLHF_JAX_SMOLLM2 names the directory that tests/reference/smollm2_from_gguf.py wrote.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.models.transformer import make_model

DIRECTORY = os.environ.get("RLHF_JAX_SMOLLM2")
FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "smollm2.npz"
NEW_TOKENS = 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DIRECTORY is None, reason="RLHF_JAX_SMOLLM2 is not set"),
]


@functools.cache
def load():
    found = load_pretrained(DIRECTORY)
    with np.load(FIXTURE) as arrays:
        return make_model(found.config), found.params, dict(arrays)


@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_logits_equal_those_of_transformers(side):
    model, params, arrays = load()

    @jax.jit
    def logits(params, tokens, mask, rows):
        hidden = model.apply(params, tokens, mask)
        hidden = jnp.take_along_axis(hidden, rows[..., None], axis=1)
        return model.unembed(params, hidden)

    inputs = (arrays[name][side] for name in ("tokens", "mask", "rows"))
    got = np.asarray(logits(params, *inputs))
    np.testing.assert_array_equal(got.argmax(-1), arrays["top"][side])
    got = got[..., arrays["columns"]]
    print("largest difference", np.abs(got - arrays["logits"][side]).max())
    np.testing.assert_allclose(got, arrays["logits"][side], atol=2e-4)


def test_greedy_tokens_equal_those_of_generate():
    model, params, arrays = load()
    prompts, mask = arrays["prompts"], arrays["prompt_mask"]
    P = prompts.shape[1]

    @jax.jit
    def generate(params, prompts, mask):
        hidden, cache = model.prefill(
            params, prompts, mask, cache_length=P + NEW_TOKENS
        )
        unstacked = model.unstack(params)

        def step(carry, slot):
            token, cache = carry
            hidden, cache = model.decode(unstacked, token, cache, slot)
            return (model.unembed(unstacked, hidden).argmax(-1), cache), token

        first = model.unembed(unstacked, hidden[:, -1]).argmax(-1)
        _, tokens = jax.lax.scan(step, (first, cache), P + jnp.arange(NEW_TOKENS))
        return tokens.T

    got = generate(params, prompts, mask)
    np.testing.assert_array_equal(got, arrays["greedy"])

"""Rewards of tokens, and how a kernel on them is compared with another library."""

import jax
import jax.numpy as jnp
import numpy as np


def random_arguments(rng, B=3, T=6):
    return list(rng.normal(size=(2, B, T)).astype(np.float32))


def assert_equals_reference(function, reference, name, mask, factor=1.0):
    """Value and gradient by token_rewards [B, T], which are zero in masked slots."""
    rewards = jnp.asarray(np.where(mask, reference["token_rewards"], 0.0))
    got, pull = jax.vjp(function, rewards)
    expected = reference[name] * factor
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    (got,) = pull(jnp.asarray(reference["cotangent"] * mask))
    # The reference reads padding too: before the end of a row it is discounted.
    expected = reference[f"{name}/gradient"] * factor
    np.testing.assert_allclose(
        np.where(mask, got, 0.0), np.where(mask, expected, 0.0), rtol=1e-5, atol=1e-6
    )

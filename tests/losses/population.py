"""A small population for the tests of `perturbations` and `evolution`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses.perturbations import FROZEN, FULL, densify, perturbation

# Two stacked layers, two leaves of one shape, and one more; of every kind of noise.
PARAMS = {
    "layers": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32),
    "twins": [jax.ShapeDtypeStruct((4, 3), jnp.float32)] * 2,
    "vector": jax.ShapeDtypeStruct((3,), jnp.float32),
}
RANKS = {"layers": 2, "twins": [1, FULL], "vector": FROZEN}

# Without the optimisation that takes most of the time to compile.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(rng):
    """Weights in the shapes of `PARAMS`."""
    normal = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32))
    return jax.tree.map(normal, PARAMS)


@functools.partial(jit, static_argnums=2)
def _noise(key, member, antithetic):
    noise = perturbation(PARAMS, key, member, antithetic=antithetic, ranks=RANKS)
    return jax.tree.leaves(densify(noise))


def noise_of(key, member, antithetic=True):
    """The leaves of the noise on `PARAMS`, as numpy matrices."""
    # one type and all by position, for another would be compiled again
    return jax.device_get(_noise(key, np.int32(member), antithetic))


def assert_trees(compare, got, expected):
    """`compare` each leaf of the one with that of the other."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        compare(x, y)


equal = functools.partial(assert_trees, np.testing.assert_array_equal)
close = functools.partial(
    assert_trees, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
)

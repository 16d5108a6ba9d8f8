"""What `token_logprobs` takes: devices that share the work, and memory."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import token_logprobs

D = 5


def test_eight_devices_equal_one(rng):
    """Rows over "data" and the vocabulary over "tensor", with gradients."""
    mesh = jax.make_mesh(
        (4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    hidden = jnp.asarray(rng.normal(size=(8, 6, D)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(12, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 12, (8, 6)))

    @jax.jit
    def step(hidden, unembedding, targets):
        def loss(hidden, unembedding):
            results = token_logprobs(
                hidden, unembedding, targets, temperature=0.7, chunk_size=2
            )
            return (results[0] + 0.1 * results[1]).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembedding)

    expected = step(hidden, unembedding, targets)
    put = [
        jax.device_put(x, jax.NamedSharding(mesh, jax.P(axis)))
        for x, axis in ((hidden, "data"), (unembedding, "tensor"), (targets, "data"))
    ]
    for x, y in zip(
        jax.tree.leaves(step(*put)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_devices_that_share_the_batch_meet_once_and_not_once_a_chunk():
    """No loop of the compiled program adds anything up over devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))

    def loss(hidden, unembedding, targets):
        results = token_logprobs(
            hidden,
            unembedding,
            targets,
            temperature=1.0,
            chunk_size=2,
            batch_shards=8,
        )
        return (results[0] + 0.1 * results[1]).sum()

    lowered = jax.jit(
        jax.grad(loss, argnums=(0, 1)),
        in_shardings=(rows, whole, rows),
        out_shardings=(rows, whole),
    ).lower(
        jax.ShapeDtypeStruct((8, 6, 4), jnp.float32),
        jax.ShapeDtypeStruct((10, 4), jnp.float32),
        jax.ShapeDtypeStruct((8, 6), jnp.int32),
    )
    loops, _, entry = lowered.compile().as_text().partition("\nENTRY")
    assert "all-reduce(" in entry
    for collective in ("all-reduce(", "all-gather(", "all-to-all("):
        assert collective not in loops


def temporary_bytes(chunk_size, B, T, D, V):
    """What XLA sets aside for value and gradient, beyond arguments and results."""

    def loss(hidden, unembedding, targets):
        logprobs, entropy = token_logprobs(
            hidden, unembedding, targets, temperature=1.0, chunk_size=chunk_size
        )
        return -logprobs.sum() - 0.01 * entropy.sum()

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_chunks_take_a_tenth_of_the_memory():
    """Compiled, not run: 8 sequences of 1024 tokens, a vocabulary of 131072."""
    shape = B, T, _, V = 8, 1024, 64, 131_072
    whole = temporary_bytes(None, *shape)
    assert whole >= 4 * B * T * V
    assert temporary_bytes(64, *shape) < whole / 10

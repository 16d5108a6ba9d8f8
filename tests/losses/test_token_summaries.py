import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import log_sum_squares, token_logprobs, top_logprobs
from tests.losses import invariants

B, T, D, V, K = 3, 7, 5, 11, 4
CASES = {
    "whole_capped": {"temperature": 1.3, "chunk_size": None, "logit_softcap": 2.0},
    "ones": {"temperature": 0.7, "chunk_size": 1},
    "threes_capped": {"temperature": 0.7, "chunk_size": 3, "logit_softcap": 2.0},
}
each_case = pytest.mark.parametrize("case", CASES)


def random_arguments(rng):
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    return hidden, rng.normal(size=(V, D)).astype(np.float32)


def test_values_worked_by_hand():
    # hidden 1 against ln 1, ln 5, ln 2: probabilities 1/8, 5/8, 2/8
    hidden = np.ones((1, 1, 1), np.float32)
    unembedding = np.log(np.array([[1.0], [5.0], [2.0]], np.float32))
    got = top_logprobs(hidden, unembedding, k=2, temperature=1.0, chunk_size=None)
    np.testing.assert_array_equal(got.tokens, [[[1, 2]]])
    np.testing.assert_allclose(got.logprobs, np.log([[[5 / 8, 2 / 8]]]), rtol=1e-6)


@each_case
def test_equals_a_sort_of_everything(rng, case):
    hidden, unembedding = random_arguments(rng)
    settings = CASES[case]
    got = jax.jit(functools.partial(top_logprobs, k=K, **settings))(hidden, unembedding)
    z = np.einsum("btd,vd->btv", hidden.astype(float), unembedding.astype(float))
    cap = settings.get("logit_softcap")
    z = (z if cap is None else cap * np.tanh(z / cap)) / settings["temperature"]
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    order = np.argsort(-logp, axis=-1)[..., :K]
    np.testing.assert_array_equal(got.tokens, order)
    expected = np.take_along_axis(logp, order, axis=-1)
    np.testing.assert_allclose(got.logprobs, expected, rtol=1e-5, atol=1e-6)


@each_case
def test_gradient_is_that_of_the_tokens_found(rng, case):
    hidden, unembedding = random_arguments(rng)
    settings = CASES[case]
    weights = rng.normal(size=(B, T, K)).astype(np.float32)

    def top(hidden, unembedding):
        found = top_logprobs(hidden, unembedding, k=K, **settings)
        return (weights * found.logprobs).sum(), found.tokens

    gradients, tokens = jax.jit(jax.grad(top, argnums=(0, 1), has_aux=True))(
        hidden, unembedding
    )

    def each(hidden, unembedding):
        logprobs = [
            token_logprobs(hidden, unembedding, tokens[..., i], **settings)[0]
            for i in range(K)
        ]
        return (weights * jnp.stack(logprobs, -1)).sum()

    expected = jax.jit(jax.grad(each, argnums=(0, 1)))(hidden, unembedding)
    for got, want in zip(gradients, expected):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_all_tokens_are_the_whole_distribution(rng):
    got = top_logprobs(*random_arguments(rng), k=V, temperature=1.0, chunk_size=2)
    np.testing.assert_allclose(np.exp(got.logprobs).sum(-1), 1.0, rtol=1e-6)


def test_padding_is_irrelevant(rng):
    hidden, unembedding = random_arguments(rng)
    mask = invariants.random_mask(rng, B, T)
    call = functools.partial(top_logprobs, k=K, temperature=1.0, chunk_size=3)

    def total(hidden):
        found = call(hidden, unembedding, mask)
        return found.logprobs.sum(), found

    clean = jax.grad(total, has_aux=True)(jnp.asarray(hidden))
    assert not np.asarray(clean[1].logprobs)[~mask].any()
    assert not np.asarray(clean[1].tokens)[~mask].any()
    for fill in invariants.FILLS:
        filled = np.where(mask[..., None], hidden, np.float32(fill))
        got = jax.grad(total, has_aux=True)(jnp.asarray(filled))
        jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_jit_equals_eager_and_bfloat16_gives_float32(rng):
    call = functools.partial(top_logprobs, k=K, temperature=1.0, chunk_size=3)
    arrays = random_arguments(rng)
    invariants.assert_jit_equals_eager(call, *arrays)
    low = call(*(jnp.asarray(x, jnp.bfloat16) for x in arrays))
    assert low.logprobs.dtype == jnp.float32
    assert low.tokens.dtype == jnp.int32


def test_what_does_not_fit_raises(rng):
    hidden, unembedding = random_arguments(rng)
    settings = {"temperature": 1.0, "chunk_size": None}
    with pytest.raises(ValueError, match=r"^unembedding has shape"):
        top_logprobs(hidden, unembedding[:, :-1], k=K, **settings)
    with pytest.raises(ValueError, match=r"^mask has shape"):
        top_logprobs(hidden, unembedding, np.ones((B, 1), bool), k=K, **settings)
    for k in (0, V + 1):
        with pytest.raises(
            ValueError, match=rf"^k is {k}, expected .*(at least 1|\[1, 11\])\."
        ):
            top_logprobs(hidden, unembedding, k=k, **settings)


@each_case
def test_log_sum_squares(rng, case):
    """Against the probabilities of every token, and their gradient by hand.

    ∂/∂z_v log Σ p² = 2 p_v² / Σ p² − 2 p_v, times 1/τ and the cap's slope.
    """
    hidden, unembedding = random_arguments(rng)
    settings = CASES[case]
    call = functools.partial(log_sum_squares, **settings)
    value, gradient = jax.jit(jax.value_and_grad(lambda h: call(h, unembedding).sum()))(
        hidden
    )
    z = np.einsum("btd,vd->btv", hidden.astype(float), unembedding.astype(float))
    cap, tau = settings.get("logit_softcap"), settings["temperature"]
    slope = 1.0 if cap is None else 1.0 - np.tanh(z / cap) ** 2
    z = (z if cap is None else cap * np.tanh(z / cap)) / tau
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    squares = (p**2).sum(-1, keepdims=True)
    np.testing.assert_allclose(value, np.log(squares).sum(), rtol=1e-5)
    slope = slope / tau * (2 * p**2 / squares - 2 * p)
    expected = np.einsum("btv,vd->btd", slope, unembedding)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_log_sum_squares_under_the_mask(rng):
    hidden, unembedding = random_arguments(rng)
    mask = invariants.random_mask(rng, B, T)
    call = functools.partial(log_sum_squares, temperature=1.0, chunk_size=3)
    clean = call(hidden, unembedding, mask)
    assert not np.asarray(clean)[~mask].any()
    assert (np.asarray(clean)[mask] < 0).all()
    filled = np.where(mask[..., None], hidden, np.float32(np.nan))
    np.testing.assert_array_equal(call(filled, unembedding, mask), clean)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import kl, token_logprobs
from tests.losses import invariants

B, T, D, D_REF, V = 3, 7, 5, 4, 11
CASES = {
    "whole_capped": {"temperature": 1.3, "chunk_size": None, "logit_softcap": 2.0},
    "ones": {"temperature": 0.7, "chunk_size": 1},
    "threes_capped": {"temperature": 0.7, "chunk_size": 3, "logit_softcap": 2.0},
}
each_case = pytest.mark.parametrize("case", CASES)


def random_arguments(rng):
    shapes = [(B, T, D), (V, D), (B, T, D_REF), (V, D_REF)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def loop(hidden, unembedding, ref_hidden, ref_unembedding, *, temperature, cap=None):
    """Σ p (log p − log q) in float64, token by token of the vocabulary."""

    def logprobs(h, W):
        z = [float(h.astype(float) @ w) for w in W.astype(float)]
        z = z if cap is None else [cap * np.tanh(x / cap) for x in z]
        z = [x / temperature for x in z]
        normalizer = np.log(sum(np.exp(x) for x in z))
        return [x - normalizer for x in z]

    result = np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            p = logprobs(hidden[b, t], unembedding)
            q = logprobs(ref_hidden[b, t], ref_unembedding)
            result[b, t] = sum(np.exp(x) * (x - y) for x, y in zip(p, q))
    return result


def oracle(arrays, case):
    settings = CASES[case]
    cap = settings.get("logit_softcap")
    return loop(*arrays, temperature=settings["temperature"], cap=cap)


@functools.cache
def compiled(case):
    """Values, and the gradients of their sum with random weights."""
    weights = np.random.default_rng(3).normal(size=(B, T)).astype(np.float32)

    def total(*arrays):
        values = kl.exact(*arrays, **CASES[case])
        return (weights * values).sum(), values

    return weights, jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))


def test_values_worked_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): ½ ln 2 + ½ ln (2/3) = 0.3465736 − 0.2027326
    p, q = np.log([[[1.0, 1.0]]]), np.log([[[1.0, 3.0]]])
    got = kl.exact_from_logits(jnp.float32(p), jnp.float32(q), temperature=1.0)
    np.testing.assert_allclose(got, [[0.1438410]], rtol=1e-6)
    # at temperature 1/2, q = (1/10, 9/10): ½ ln 5 + ½ ln (5/9) = 0.8047190 − 0.2938933
    got = kl.exact_from_logits(jnp.float32(p), jnp.float32(q), temperature=0.5)
    np.testing.assert_allclose(got, [[0.5108256]], rtol=1e-6)


@each_case
def test_equals_a_loop(rng, case):
    arrays = random_arguments(rng)
    _, values = compiled(case)[1](*arrays)
    np.testing.assert_allclose(values, oracle(arrays, case), rtol=1e-5, atol=1e-6)


@each_case
def test_gradients_equal_finite_differences_of_the_loop(rng, case):
    arrays = random_arguments(rng)
    weights, function = compiled(case)
    gradients, _ = function(*arrays)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=arrays[i].shape)
        step = 1e-5 * direction
        up, down = (
            (weights * oracle([*arrays[:i], moved, *arrays[i + 1 :]], case)).sum()
            for moved in (arrays[i] + step, arrays[i] - step)
        )
        got = (np.asarray(gradient, np.float64) * direction).sum()
        np.testing.assert_allclose(got, (up - down) / 2e-5, rtol=1e-5, atol=1e-5)


def test_logits_give_the_same(rng):
    arrays = random_arguments(rng)
    z, z_ref = (np.einsum("btd,vd->btv", *arrays[i : i + 2]) for i in (0, 2))
    settings = {"temperature": 0.7, "logit_softcap": 2.0}
    got = kl.exact_from_logits(z, z_ref, **settings)
    expected = kl.exact(*arrays, chunk_size=3, **settings)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_is_the_mean_of_k1_over_the_vocabulary(rng):
    """KL = Σ_v π(v) k1(v), with the log-probabilities of every token as target."""
    hidden, unembedding, *_ = arrays = random_arguments(rng)
    ref_hidden = arrays[2]
    expected = jnp.zeros((B, T))
    for v in range(V):
        targets = np.full((B, T), v, np.int32)
        settings = {"temperature": 1.0, "chunk_size": None}
        new, _ = token_logprobs(hidden, unembedding, targets, **settings)
        ref, _ = token_logprobs(ref_hidden, arrays[3], targets, **settings)
        expected += jnp.exp(new) * kl.k1(new, ref, np.ones((B, T), bool))
    got = kl.exact(*arrays, temperature=1.0, chunk_size=2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.asarray(got).min() > 0


def test_zero_at_the_reference_with_zero_gradient(rng):
    hidden, unembedding, *_ = random_arguments(rng)

    def total(hidden):
        arrays = (hidden, unembedding) * 2
        arrays = (hidden, unembedding, *map(jax.lax.stop_gradient, arrays[2:]))
        return kl.exact(*arrays, temperature=1.0, chunk_size=2).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(hidden))
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_logits_under_the_mask_are_irrelevant(rng):
    mask = invariants.random_mask(rng, B, T)
    logits = rng.normal(size=(2, B, T, V)).astype(np.float32)

    def total(logits):
        return kl.exact_from_logits(*logits, mask, temperature=1.0).sum()

    clean, clean_gradient = jax.value_and_grad(total)(jnp.asarray(logits))
    for fill in invariants.FILLS:
        filled = np.where(mask[..., None], logits, np.float32(fill))
        value, gradient = jax.value_and_grad(total)(jnp.asarray(filled))
        assert value == clean
        np.testing.assert_array_equal(gradient, clean_gradient)


def test_tokens_that_cannot_be_drawn():
    """As top-p leaves them: no share in the sum, no nan in the gradient."""
    z = jnp.float32([[[0.0, 1.0, -jnp.inf]]])
    z_ref = jnp.float32([[[0.0, 0.5, 2.0]]])
    value, gradient = jax.value_and_grad(
        lambda z: kl.exact_from_logits(z, z_ref, temperature=1.0).sum()
    )(z)
    p, q = np.exp([0.0, 1.0]), np.exp([0.0, 0.5, 2.0])
    p, q = p / p.sum(), q / q.sum()
    np.testing.assert_allclose(value, (p * np.log(p / q[:2])).sum(), rtol=1e-6)
    assert np.isfinite(gradient).all()
    never = kl.exact_from_logits(z_ref, z, temperature=1.0)
    assert np.isposinf(never).all()


def test_jit_equals_eager_and_bfloat16_gives_float32(rng):
    arrays = random_arguments(rng)
    function = functools.partial(kl.exact, temperature=0.7, chunk_size=3)
    invariants.assert_jit_equals_eager(function, *arrays)
    low = function(*(jnp.asarray(x, jnp.bfloat16) for x in arrays))
    assert low.dtype == jnp.float32
    # bfloat16 keeps 8 bits, of products that the sums of 5 add up
    np.testing.assert_allclose(low, function(*arrays), atol=0.1)


def test_what_does_not_fit_raises(rng):
    arrays = random_arguments(rng)
    call = functools.partial(kl.exact, temperature=1.0, chunk_size=None)
    for i, name in enumerate(
        ("unembedding", "unembedding", "ref_unembedding", "ref_unembedding")
    ):
        wrong = list(arrays)
        wrong[i] = wrong[i][..., :-1]
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            call(*wrong)
    with pytest.raises(ValueError, match=r"^ref_hidden has shape"):
        call(*arrays[:2], arrays[2][:, :-1], arrays[3])
    with pytest.raises(ValueError, match=r"^mask has shape"):
        call(*arrays, np.ones((B, T + 1), bool))
    with pytest.raises(ValueError, match=r"^temperature is 0"):
        kl.exact(*arrays, temperature=0.0, chunk_size=None)
    with pytest.raises(ValueError, match=r"^chunk_size is 0"):
        kl.exact(*arrays, temperature=1.0, chunk_size=0)
    with pytest.raises(ValueError, match=r"^ref_logits has shape"):
        z = np.zeros((B, T, V), np.float32)
        kl.exact_from_logits(z, z[..., :-1], temperature=1.0)


def test_logits_of_a_chunk_are_all_that_exists():
    """Compiled memory of the gradient, B=2, T=256, V=4096: not the whole [B, T, V]."""
    shapes = [(2, 256, 16), (4096, 16), (2, 256, 16), (4096, 16)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def memory(chunk_size):
        function = functools.partial(kl.exact, temperature=1.0, chunk_size=chunk_size)
        total = jax.jit(jax.grad(lambda *x: function(*x).sum(), argnums=(0, 1)))
        return total.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < 0.15 * memory(None)

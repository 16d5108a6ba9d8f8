import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import (
    aggregation,
    generalized_jsd,
    generalized_jsd_from_logits,
    kl,
)
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/losses/distillation.npz"
B, T, D, TEACHER_D, V = 2, 5, 4, 3, 7
BETAS = (0.0, 0.3, 1.0)
each_beta = pytest.mark.parametrize("beta", BETAS)


def random_arguments(rng):
    shapes = [(B, T, D), (V, D), (B, T, TEACHER_D), (V, TEACHER_D)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def test_values_worked_by_hand():
    # the student q = (1/2, 1/2), the teacher p = (1/4, 3/4)
    student, teacher = jnp.log(jnp.array([[[[1.0, 1.0]]], [[[1.0, 3.0]]]]))
    call = functools.partial(generalized_jsd_from_logits, student, teacher)
    # p to q: 1/4 ln 1/2 + 3/4 ln 3/2 = -0.1732868 + 0.3040988
    got = call(beta=0, temperature=1.0)
    np.testing.assert_allclose(got, [[0.1308120]], rtol=1e-6)
    # q to p: 1/2 ln 2 + 1/2 ln 2/3 = 0.3465736 - 0.2027326
    got = call(beta=1, temperature=1.0)
    np.testing.assert_allclose(got, [[0.1438410]], rtol=1e-6)
    # β = 1/4: m = (7/16, 9/16)
    # p to m: 1/4 ln 4/7 + 3/4 ln 4/3 = -0.1399040 + 0.2157616 = 0.0758576
    # q to m: 1/2 ln 8/7 + 1/2 ln 8/9 = 0.0667657 - 0.0588915 = 0.0078742
    # 0.0758576 / 4 + 3/4 · 0.0078742 = 0.0189644 + 0.0059057
    got = call(beta=0.25, temperature=1.0)
    np.testing.assert_allclose(got, [[0.0248701]], rtol=1e-5)


def loop(arrays, beta, temperature, cap):
    """Σ over the vocabulary in float64, token by token."""

    def probabilities(h, W):
        z = [cap * np.tanh(float(h.astype(float) @ w) / cap) for w in W.astype(float)]
        weights = [np.exp(x / temperature) for x in z]
        return [w / sum(weights) for w in weights]

    def kl_sum(a, b):
        return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True))

    hidden, unembedding, teacher_hidden, teacher_unembedding = arrays
    result = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        q = probabilities(hidden[b, t], unembedding)
        p = probabilities(teacher_hidden[b, t], teacher_unembedding)
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        if beta in (0.0, 1.0):
            result[b, t] = kl_sum(p, q) if beta == 0.0 else kl_sum(q, p)
        else:
            result[b, t] = beta * kl_sum(p, m) + (1 - beta) * kl_sum(q, m)
    return result


@each_beta
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_equals_a_loop_gradients_too(rng, beta, chunk_size):
    arrays = random_arguments(rng)
    weights = rng.normal(size=(B, T)).astype(np.float32)

    def total(*arrays):
        values = generalized_jsd(
            *arrays,
            beta=beta,
            temperature=0.7,
            chunk_size=chunk_size,
            logit_softcap=2.0,
        )
        return (weights * values).sum(), values

    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(
        *arrays
    )
    oracle = functools.partial(loop, beta=beta, temperature=0.7, cap=2.0)
    np.testing.assert_allclose(values, oracle(arrays), rtol=1e-5, atol=1e-6)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=arrays[i].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(arrays)
            moved[i] = arrays[i] + step * direction
            ends.append((weights * oracle(moved)).sum())
        along = (np.asarray(gradient, np.float64) * direction).sum()
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-5)


def test_equals_trl():
    """The mean over the tokens of the mask, as GKDTrainer takes it."""
    with np.load(FIXTURE) as file:
        x = dict(file)
    mask, temperature = x["mask"], float(x["temperature"])
    for i, beta in enumerate(x["betas"]):

        def mean(logits, beta=float(beta)):
            loss = generalized_jsd_from_logits(
                *(logits, jnp.float32(x["teacher_logits"]), mask),
                **{"beta": beta, "temperature": temperature},
            )
            total, count = aggregation.token_mean(loss, mask)
            return total / count

        got, gradient = jax.jit(jax.value_and_grad(mean))(jnp.float32(x["logits"]))
        np.testing.assert_allclose(got, x["losses"][i], rtol=1e-5)
        np.testing.assert_allclose(gradient, x["gradients"][i], rtol=1e-4, atol=1e-7)


def test_the_ends_are_the_two_exact_kls(rng):
    arrays = random_arguments(rng)
    swapped = arrays[2:] + arrays[:2]
    options = {"temperature": 0.7, "chunk_size": 2}
    for beta, expected in ((0.0, swapped), (1.0, arrays)):
        np.testing.assert_allclose(
            generalized_jsd(*arrays, beta=beta, **options),
            kl.exact(*expected, **options),
            rtol=1e-6,
        )


def test_a_half_is_symmetric_and_at_most_log_two(rng):
    far = 30.0 * rng.normal(size=(2, B, T, V)).astype(np.float32)
    call = functools.partial(generalized_jsd_from_logits, beta=0.5, temperature=1.0)
    got = np.asarray(call(*far))
    np.testing.assert_allclose(got, call(*far[::-1]), rtol=1e-5, atol=1e-6)
    assert got.max() <= np.log(2.0) + 1e-6
    np.testing.assert_allclose(call(far[0], far[0]), np.zeros((B, T)), atol=1e-6)


@each_beta
def test_tokens_that_neither_draws_add_nothing(rng, beta):
    logits = rng.normal(size=(2, B, T, V)).astype(np.float32)
    never = np.full((2, B, T, 2), -np.inf, np.float32)
    cut = np.concatenate([logits, never], -1)

    def total(logits):
        call = functools.partial(generalized_jsd_from_logits, temperature=0.7)
        return call(*logits, beta=beta).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(cut))
    expected, slopes = jax.value_and_grad(total)(jnp.asarray(logits))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :V], slopes, rtol=1e-5, atol=1e-6)
    assert not np.asarray(gradient[..., V:]).any()


def test_bfloat16_gives_float32(rng):
    halves = [jnp.asarray(x, jnp.bfloat16) for x in random_arguments(rng)]
    options = {"beta": 0.3, "temperature": 0.7, "chunk_size": 2}
    assert generalized_jsd(*halves, **options).dtype == jnp.float32
    invariants.assert_bfloat16_gives_float32(
        lambda *x: generalized_jsd_from_logits(*x, beta=0.3, temperature=0.7),
        list(rng.normal(size=(2, B, T, V))),
    )


def test_what_does_not_fit_raises(rng):
    arrays = random_arguments(rng)
    options = {"beta": 0.5, "temperature": 1.0, "chunk_size": None}
    wrong = [*arrays[:2], arrays[2][:, 1:], arrays[3]]
    with pytest.raises(ValueError, match=r"^teacher_hidden has shape .* of hidden"):
        generalized_jsd(*wrong, **options)
    with pytest.raises(ValueError, match=r"^teacher_unembedding has shape \(6, 3\)"):
        generalized_jsd(*arrays[:3], arrays[3][1:], **options)
    logits = np.zeros((B, T, V), np.float32)
    with pytest.raises(ValueError, match=r"^teacher_logits has shape"):
        generalized_jsd_from_logits(logits, logits[..., 1:], beta=0.5, temperature=1.0)
    for beta in (-0.1, 1.5, True):
        with pytest.raises(ValueError, match=f"^beta is {beta}, expected a number"):
            generalized_jsd_from_logits(logits, logits, beta=beta, temperature=1.0)
        with pytest.raises(ValueError, match=f"^beta is {beta}, expected a number"):
            generalized_jsd(*arrays, **(options | {"beta": beta}))

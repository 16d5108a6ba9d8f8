import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.losses import kl
from tests.losses import invariants

ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
FUNCTIONS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "abs": kl.absolute}
NAMES = ["logprobs", "ref_logprobs", "mask"]

each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


@functools.cache  # one function object an estimator, so that jit compiles it once
def named(estimator):
    return functools.partial(kl.estimate, estimator=estimator)


def random_arguments(rng, B=3, T=5):
    logprobs, ref_logprobs = -rng.exponential(2.0, (2, B, T)).astype(np.float32)
    return [logprobs, ref_logprobs], invariants.random_mask(rng, B, T)


def test_values_worked_by_hand():
    # the policy finds the first token e times as likely as the reference does, d = 1,
    # and the second half as likely, d = ln(1/2) = -0.6931472; the third is padding
    logprobs = np.array([[-1.0, -1.5 - np.log(2), 0.0]], np.float32)
    ref_logprobs = np.array([[-2.0, -1.5, 7.0]], np.float32)
    mask = np.array([[True, True, False]])
    expected = {
        "k1": [1.0, -0.6931472, 0.0],
        # 1/2, and 0.6931472² / 2 = 0.2402265
        "k2": [0.5, 0.2402265, 0.0],
        # e⁻¹ - 1 + 1 = 0.3678794, and 2 - 1 - 0.6931472 = 0.3068528
        "k3": [0.3678794, 0.3068528, 0.0],
        "abs": [1.0, 0.6931472, 0.0],
    }
    for name, function in FUNCTIONS.items():
        got = function(logprobs, ref_logprobs, mask)
        np.testing.assert_allclose(got, [expected[name]], rtol=1e-6, err_msg=name)
        through = kl.straight_through(got, logprobs, ref_logprobs, mask)
        np.testing.assert_array_equal(through, got)


@each_estimator
def test_equals_a_loop(rng, estimator):
    arrays, mask = random_arguments(rng)
    values, slopes = np.zeros(mask.shape), np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        d = float(arrays[0][i, t]) - float(arrays[1][i, t])
        values[i, t], slopes[i, t] = {
            "k1": (d, 1.0),
            "k2": (d * d / 2, d),
            "k3": (np.exp(-d) - 1 + d, 1 - np.exp(-d)),
            "abs": (abs(d), np.sign(d)),
        }[estimator.rstrip("+")]
        if estimator.endswith("+"):
            slopes[i, t] = d
    function = named(estimator)
    np.testing.assert_allclose(
        jax.jit(function)(*arrays, mask), values, rtol=1e-5, atol=1e-6
    )
    gradient = jax.jit(jax.grad(lambda x: function(x, arrays[1], mask).sum()))(
        arrays[0]
    )
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)


def test_expected_gradients_are_those_of_the_documented_divergence():
    """Exact expectations over a vocabulary of four, by its probabilities."""
    logits, ref_logits = np.array([[0.3, -1.0, 0.8, 0.1], [1.0, 0.2, -0.5, 0.0]])
    policy = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    ref = jax.nn.log_softmax(jnp.asarray(ref_logits, jnp.float32))
    everything = jnp.ones((1, 4), bool)

    def expected_gradient(estimator):
        def loss(x):
            logprobs = jax.nn.log_softmax(x)
            estimates = kl.estimate(
                logprobs[None], ref[None], everything, estimator=estimator
            )
            return (jax.lax.stop_gradient(jnp.exp(logprobs)) * estimates[0]).sum()

        return jax.jit(jax.grad(loss))(jnp.asarray(logits, jnp.float32))

    def divergence(x, y):
        return (jnp.exp(x) * (x - y)).sum()

    def grad_in_logits(function):
        gradient = jax.jit(jax.grad(lambda x: function(jax.nn.log_softmax(x))))
        return gradient(jnp.asarray(logits, jnp.float32))

    reverse = grad_in_logits(lambda x: divergence(x, ref))
    forward = grad_in_logits(lambda x: divergence(ref, x))
    for estimator in ("k2", "k1+", "k3+", "abs+"):
        np.testing.assert_allclose(expected_gradient(estimator), reverse, atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k1"), np.zeros(4), atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k3"), forward, atol=1e-6)
    # and as values k1 and k3 have the mean KL(policy || reference)
    for function in (kl.k1, kl.k3):
        mean = (
            jnp.exp(policy) * function(policy[None], ref[None], everything)[0]
        ).sum()
        np.testing.assert_allclose(mean, divergence(policy, ref), rtol=1e-5)


@jax.jit
def values_and_slopes(logprobs, ref_logprobs):
    mask = jnp.ones(logprobs.shape, bool)
    return [
        jax.value_and_grad(lambda x, f=function: f(x, ref_logprobs, mask).sum())(
            logprobs
        )
        for function in (kl.k2, kl.k3, kl.absolute)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    d=st.floats(-200.0, 200.0, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32),
    ref_logprob=st.floats(-50.0, 0.0, width=32),
)
def test_never_negative_and_always_finite(d, ref_logprob):
    ref_logprobs = np.full((1, 1), ref_logprob, np.float32)
    for value, slope in values_and_slopes(ref_logprobs + np.float32(d), ref_logprobs):
        assert np.isfinite(value) and np.isfinite(slope).all()
        assert float(value) >= 0.0


def test_k3_beyond_the_clamp_is_flat_on_one_side_and_exact_on_the_other():
    ref_logprobs, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    logprobs = jnp.array([[-30.0, 30.0]])
    values = kl.k3(logprobs, ref_logprobs, mask)
    # e²⁰ - 1 - 20 = 485165195.4 - 21; and e⁻³⁰ - 1 + 30 = 29
    np.testing.assert_allclose(values, [[485165174.4, 29.0]], rtol=1e-6)
    slopes = jax.grad(lambda x: kl.k3(x, ref_logprobs, mask).sum())(logprobs)
    np.testing.assert_allclose(slopes, [[0.0, 1.0]], rtol=1e-6)


def test_equal_policies_have_no_divergence(rng):
    (logprobs, _), mask = random_arguments(rng)
    for estimator in ESTIMATORS:
        assert not np.asarray(named(estimator)(logprobs, logprobs, mask)).any()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_wrong_shape_raises(rng, function):
    arrays, mask = random_arguments(rng)
    invariants.assert_wrong_shapes_raise(function, [*arrays, mask], NAMES)


def test_straight_through_of_another_shape_raises(rng):
    (logprobs, ref_logprobs), mask = random_arguments(rng)
    with pytest.raises(
        ValueError, match=r"value has shape \(3, 4\), expected \(3, 5\)"
    ):
        kl.straight_through(logprobs[:, :4], logprobs, ref_logprobs, mask)


def test_unknown_estimator_raises_with_the_known_ones(rng):
    arrays, mask = random_arguments(rng)
    for unknown, known in itertools.product(("k4", "k2+", "K1"), ESTIMATORS):
        with pytest.raises(ValueError, match="expected one of") as error:
            kl.estimate(*arrays, mask, estimator=unknown)
        assert repr(unknown) in str(error.value)
        assert known in str(error.value)

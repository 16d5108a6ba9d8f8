import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import logprobs_from_logits, token_logprobs
from tests.losses import invariants

B, T, D, V = 3, 7, 5, 11
# of seven tokens: all at once, one by one, a chunk size that does not divide, and one
# longer than a sequence
CASES = {
    "whole_capped": {"temperature": 1.3, "chunk_size": None, "logit_softcap": 2.0},
    "ones": {"temperature": 0.7, "chunk_size": 1},
    "threes_capped": {"temperature": 0.7, "chunk_size": 3, "logit_softcap": 2.0},
    "shards": {"temperature": 0.7, "chunk_size": 3, "batch_shards": 3},
    "hundred_smoothed": {"temperature": 1.3, "chunk_size": 100, "label_smoothing": 0.1},
}
each_case = pytest.mark.parametrize("case", CASES)
each_chunk = pytest.mark.parametrize("chunk_size", [None, 3])


def without_chunks(case):
    chunking = ("chunk_size", "batch_shards")
    return {name: x for name, x in CASES[case].items() if name not in chunking}


def random_arguments(rng):
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    unembedding = rng.normal(size=(V, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return hidden, unembedding, targets


def log_softmax_rows(
    hidden, unembedding, temperature, logit_softcap=None, label_smoothing=None
):
    """log p of every token, by loops over [B, T, V] in float64."""
    rows = np.zeros((B, T, V))
    for b in range(B):
        for t in range(T):
            z = [
                float(hidden[b, t].astype(float) @ w) for w in unembedding.astype(float)
            ]
            if logit_softcap is not None:
                z = [logit_softcap * np.tanh(x / logit_softcap) for x in z]
            z = [x / temperature for x in z]
            normalizer = np.log(sum(np.exp(x) for x in z))
            rows[b, t] = [x - normalizer for x in z]
    return rows


def weighted_sum(logprobs, entropy):
    """A scalar in which every result has a weight of its own."""
    weights = np.random.default_rng(3).normal(size=(2, B, T)).astype(np.float32)
    return (weights[0] * logprobs).sum() + (weights[1] * entropy).sum()


def test_values_worked_by_hand():
    # hidden 2 against the columns 0, ln2/2, ln5/2 gives the logits 0, ln 2, ln 5:
    # the probabilities are 1/8, 2/8, 5/8
    hidden = np.array([[[2.0]]], np.float32)
    unembedding = np.log(np.array([[1.0], [2.0], [5.0]], np.float32)) / 2.0
    # -(1/8 ln 1/8 + 2/8 ln 2/8 + 5/8 ln 5/8) = 0.2599302 + 0.3465736 + 0.2937523
    entropy = 0.9002561
    hidden, targets = np.repeat(hidden, 3, axis=1), np.array([[0, 1, 2]])
    logits = np.einsum("btd,vd->btv", hidden, unembedding)
    chunked = jax.jit(
        functools.partial(token_logprobs, temperature=1.0),
        static_argnames="chunk_size",
    )
    plain = jax.jit(logprobs_from_logits, static_argnames="temperature")
    for got in (
        chunked(hidden, unembedding, targets, chunk_size=None),
        chunked(hidden, unembedding, targets, chunk_size=2),
        plain(logits, targets, temperature=1.0),
    ):
        np.testing.assert_allclose(got[0], np.log([[1 / 8, 2 / 8, 5 / 8]]), rtol=1e-6)
        np.testing.assert_allclose(got[1], [[entropy] * 3], rtol=1e-6)
    # at temperature 1/2 the logits double: 1, 4, 25 of 30
    got = plain(logits, targets, temperature=0.5)
    np.testing.assert_allclose(got[0], np.log([[1 / 30, 4 / 30, 25 / 30]]), rtol=1e-5)


@functools.cache
def compiled(name):
    """The results of a case and the gradients of their weighted sum."""

    def loss(hidden, unembedding, targets):
        results = token_logprobs(hidden, unembedding, targets, **CASES[name])
        return weighted_sum(*results), results

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@each_case
def test_equals_a_loop(rng, case):
    hidden, unembedding, targets = random_arguments(rng)
    rows = log_softmax_rows(hidden, unembedding, **without_chunks(case))
    _, (logprobs, entropy) = compiled(case)(hidden, unembedding, targets)
    epsilon = CASES[case].get("label_smoothing", 0.0)
    for b in range(B):
        for t in range(T):
            expected = (1 - epsilon) * rows[b, t, targets[b, t]]
            expected += epsilon * sum(rows[b, t]) / V
            np.testing.assert_allclose(
                np.asarray(logprobs)[b, t], expected, rtol=1e-5, atol=1e-6
            )
            expected = -sum(np.exp(x) * x for x in rows[b, t])
            np.testing.assert_allclose(
                np.asarray(entropy)[b, t], expected, rtol=1e-5, atol=1e-6
            )


@each_case
def test_gradient_equals_finite_differences_of_a_loop(rng, case):
    """Along random directions, in float64, of logprobs and entropy together."""
    hidden, unembedding, targets = random_arguments(rng)
    epsilon = CASES[case].get("label_smoothing", 0.0)

    def loop(hidden, unembedding):
        rows = log_softmax_rows(hidden, unembedding, **without_chunks(case))
        logprobs = np.take_along_axis(rows, targets[..., None], -1)[..., 0]
        logprobs = (1 - epsilon) * logprobs + epsilon * rows.mean(-1)
        return weighted_sum(logprobs, -(np.exp(rows) * rows).sum(-1))

    gradients, _ = compiled(case)(hidden, unembedding, targets)
    arrays = hidden.astype(float), unembedding.astype(float)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(arrays)
            moved[i] = arrays[i] + step * direction
            ends.append(loop(*moved))
        slope = (ends[0] - ends[1]) / 2e-5
        along = float((np.asarray(gradient, float) * direction).sum())
        np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-4)


@each_case
def test_gradient_equals_that_through_the_logits(rng, case):
    hidden, unembedding, targets = random_arguments(rng)

    def through_logits(hidden, unembedding):
        logits = jnp.einsum("btd,vd->btv", hidden, unembedding)
        return weighted_sum(
            *logprobs_from_logits(logits, targets, **without_chunks(case))
        )

    got, _ = compiled(case)(hidden, unembedding, targets)
    expected = jax.jit(jax.grad(through_logits, argnums=(0, 1)))(hidden, unembedding)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@each_chunk
@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_is_not_used_adds_nothing(rng, chunk_size, used):
    """Its cotangent is left out; so the gradient is that of zeros in its place."""
    arguments = random_arguments(rng)
    apply = functools.partial(token_logprobs, temperature=0.7, chunk_size=chunk_size)
    alone = jax.grad(lambda *x: apply(*x, arguments[2])[used].sum(), argnums=(0, 1))

    def both(*x):
        results = apply(*x, arguments[2])
        return sum(x.sum() * float(n == used) for n, x in enumerate(results))

    got = jax.jit(alone)(*arguments[:2])
    expected = jax.jit(jax.grad(both, argnums=(0, 1)))(*arguments[:2])
    each = jax.vmap(jax.jit(alone))(*(x[None] for x in arguments[:2]))
    for x, y, z in zip(got, expected, each, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x, z[0], rtol=1e-5, atol=1e-6)


def test_labels_smoothed_to_nothing(rng):
    """ε = 1 does not look at the target, though it cannot be drawn."""
    logits = rng.normal(size=(1, 2, V)).astype(np.float32)
    targets = np.zeros((1, 2), np.int32)
    logits[0, 1, 0] = -np.inf
    got, _ = logprobs_from_logits(logits, targets, temperature=1.0, label_smoothing=1.0)
    np.testing.assert_allclose(
        got[0, 0], np.asarray(jax.nn.log_softmax(logits[0, 0])).mean(), rtol=1e-5
    )
    assert got[0, 1] == -np.inf


@each_chunk
def test_padding_is_irrelevant(rng, chunk_size):
    hidden, unembedding, targets = random_arguments(rng)
    mask = invariants.random_mask(rng, B, T)

    def loss(hidden, unembedding, targets):
        results = token_logprobs(
            hidden, unembedding, targets, mask, temperature=0.7, chunk_size=chunk_size
        )
        return weighted_sum(*results), results

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def results_and_gradients(fill, fill_target):
        filled = np.where(mask[..., None], hidden, np.float32(fill))
        filled_targets = np.where(mask, targets, fill_target)
        gradients, results = gradient(filled, unembedding, filled_targets)
        return *results, *gradients

    clean = results_and_gradients(0.0, 0)
    for x in clean[:3]:
        assert not np.asarray(x)[~mask].any()
    for fill, fill_target in ((np.nan, -100), (np.inf, V), (1e30, 3)):
        for x, y in zip(results_and_gradients(fill, fill_target), clean, strict=True):
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(x, y)


def test_padding_of_logits_is_irrelevant(rng):
    logits = rng.normal(size=(B, T, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T))
    mask = invariants.random_mask(rng, B, T)

    def loss(logits):
        results = logprobs_from_logits(logits, targets, mask, temperature=0.7)
        return weighted_sum(*results)

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    clean = value_and_gradient(logits)
    for fill in invariants.FILLS:
        filled = np.where(mask[..., None], logits, np.float32(fill))
        for x, y in zip(value_and_gradient(filled), clean, strict=True):
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(x, y)


def test_tokens_that_cannot_be_drawn_add_nothing(rng):
    logits = rng.normal(size=(B, T, V)).astype(np.float32)
    targets = rng.integers(0, V - 2, (B, T))
    cut = np.concatenate([logits, np.full((B, T, 2), -np.inf, np.float32)], -1)

    def loss(logits):
        return weighted_sum(*logprobs_from_logits(logits, targets, temperature=0.7))

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    value, gradient = value_and_gradient(cut)
    expected_value, expected_gradient = value_and_gradient(logits)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :V], expected_gradient, atol=1e-6)
    assert not np.asarray(gradient[..., V:]).any()


def test_large_logits_neither_overflow_nor_lose_the_small_ones():
    # the normaliser of (1000, 999) is 1000 + ln(1 + 1/e) = 1000 + 0.3132617
    function = jax.jit(functools.partial(logprobs_from_logits, temperature=1.0))
    got, _ = function(np.array([[[1000.0, 999.0]]]), np.array([[1]]))
    np.testing.assert_allclose(got, [[-1.3132617]], rtol=1e-6)


def test_target_outside_the_vocabulary_gives_nan(rng):
    hidden, unembedding, targets = random_arguments(rng)
    targets[0, 1], targets[1, 2] = -100, V
    got, _ = token_logprobs(hidden, unembedding, targets, temperature=1.0, chunk_size=3)
    assert np.argwhere(np.isnan(got)).tolist() == [[0, 1], [1, 2]]


def test_small_integer_targets_do_not_wrap(rng):
    logits = rng.normal(size=(1, 2, 300)).astype(np.float32)
    function = jax.jit(functools.partial(logprobs_from_logits, temperature=1.0))
    expected = function(logits, np.array([[7, 255]]))
    got = function(logits, np.array([[7, 255]], np.uint8))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(got, expected)


@each_chunk
def test_rows_are_independent(rng, chunk_size):
    hidden, unembedding, targets = random_arguments(rng)

    function = jax.jit(
        functools.partial(token_logprobs, temperature=0.7, chunk_size=chunk_size)
    )

    def results(rows):
        return function(hidden[rows], unembedding, targets[rows])

    whole = np.stack(results(np.arange(B)))
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(np.stack(results(order)), whole[:, order], rtol=1e-5)
    for b in range(B):
        np.testing.assert_allclose(results([b]), whole[:, [b]], rtol=1e-5)


@pytest.mark.parametrize("case", ["whole_capped", "threes_capped"])
def test_jit_equals_eager(rng, case):
    arguments = random_arguments(rng)
    _, jitted = compiled(case)(*arguments)
    eager = token_logprobs(*arguments, **CASES[case])
    for got, expected in zip(jitted, eager, strict=True):
        assert got.dtype == expected.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


def test_bfloat16_gives_float32_and_gradients_of_the_inputs_dtypes(rng):
    hidden, unembedding, targets = random_arguments(rng)
    function = compiled("ones")
    half = jnp.asarray(hidden, jnp.bfloat16)
    # masters in float32 under bfloat16 activations: the product is in bfloat16
    gradients, results = function(half, unembedding, targets)
    assert [x.dtype for x in results] == [jnp.float32, jnp.float32]
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]
    both = half, jnp.asarray(unembedding, jnp.bfloat16)
    half_gradients, half_results = function(*both, targets)
    np.testing.assert_array_equal(results, half_results)
    assert [x.dtype for x in half_gradients] == [jnp.bfloat16, jnp.bfloat16]
    # the same rounded inputs in float32: no rounding of the result, some of gradients
    rounded = [np.asarray(x, np.float32) for x in both]
    exact_gradients, exact_results = function(*rounded, targets)
    np.testing.assert_allclose(results, exact_results, rtol=1e-6, atol=1e-6)
    for x, y in zip(gradients, exact_gradients, strict=True):
        error = np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)
        assert error < 0.01


def test_logits_in_bfloat16_give_float32(rng):
    targets = rng.integers(0, V, (B, T))
    invariants.assert_bfloat16_gives_float32(
        lambda x: logprobs_from_logits(x, targets, temperature=0.7),
        [rng.normal(size=(B, T, V))],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": np.zeros((T, D))},
            r"hidden has shape \(7, 5\), expected \[B, T, D",
        ),
        (
            {"unembedding": np.zeros((D, V))},
            r"unembedding has shape \(5, 11\), expected \(5, 5\)",
        ),
        ({"targets": np.zeros((B, T + 1), int)}, r"targets .* \(3, 8\), .* \(3, 7\)"),
        ({"targets": np.zeros((B, T))}, "targets is float32, expected an integer"),
        ({"mask": np.ones((B, T - 1), bool)}, r"mask .* \(3, 6\), expected \(3, 7\)"),
        ({"temperature": 0.0}, "temperature is 0.0, expected"),
        ({"chunk_size": 0}, "chunk_size is 0, expected a whole .* 1, or None"),
        ({"batch_shards": 2}, "batch_shards is 2, .* divides the 3 rows"),
        ({"logit_softcap": -30.0}, "logit_softcap is -30.0, expected"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, expected"),
    ],
)
def test_bad_arguments_raise(rng, change, message):
    hidden, unembedding, targets = random_arguments(rng)
    arguments = {
        "hidden": hidden,
        "unembedding": unembedding,
        "targets": targets,
        "mask": None,
        "temperature": 1.0,
        "chunk_size": 3,
    }
    with pytest.raises(ValueError, match=message):
        token_logprobs(**(arguments | change))


def test_logits_of_a_wrong_shape_raise(rng):
    targets = rng.integers(0, V, (B, T))
    with pytest.raises(ValueError, match=r"logits has shape \(3, 7\), expected \[B, T"):
        logprobs_from_logits(np.zeros((B, T)), targets, temperature=1.0)
    with pytest.raises(
        ValueError, match=r"targets has shape \(3, 7\), expected \(3, 8"
    ):
        logprobs_from_logits(np.zeros((B, T + 1, V)), targets, temperature=1.0)

import jax
import numpy as np

from rlhf_jax.losses import next_token_loss, token_logprobs
from tests.losses import invariants


def random_arguments(rng, B=4, T=6):
    logprobs = -rng.exponential(2.0, (B, T)).astype(np.float32)
    return logprobs, invariants.random_mask(rng, B, T)


def test_values_worked_by_hand():
    # 0.5 + 1.5 + 2 = 4 nats over three tokens
    logprobs = np.array([[-0.5, -1.5, np.nan], [-2.0, -np.inf, 3.0]], np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    total, count = next_token_loss(logprobs, mask)
    assert (float(total), float(count)) == (4.0, 3.0)


def test_equals_a_loop(rng):
    logprobs, mask = random_arguments(rng)
    expected, count = 0.0, 0
    for i, t in zip(*np.nonzero(mask), strict=True):
        expected -= float(logprobs[i, t])
        count += 1
    np.testing.assert_allclose(
        next_token_loss(logprobs, mask), (expected, count), rtol=1e-6
    )
    gradient = jax.jit(jax.grad(lambda x: next_token_loss(x, mask)[0]))(logprobs)
    np.testing.assert_array_equal(gradient, np.where(mask, -1.0, 0.0))


def test_smoothed_labels_equal_the_cross_entropy_with_soft_targets(rng):
    """A loop over the vocabulary, with q = 0.9 onehot + 0.1 / V."""
    hidden = rng.normal(size=(1, 3, 4)).astype(np.float32)
    unembedding = rng.normal(size=(5, 4)).astype(np.float32)
    targets, mask = np.array([[0, 3, 4]]), np.array([[True, True, False]])
    logprobs, _ = token_logprobs(
        hidden,
        unembedding,
        targets,
        mask,
        temperature=1.0,
        chunk_size=2,
        label_smoothing=0.1,
    )
    expected = 0.0
    for t in range(2):
        z = [float(hidden[0, t] @ unembedding[v]) for v in range(5)]
        normalizer = np.log(sum(np.exp(z)))
        for v in range(5):
            q = 0.1 / 5 + (0.9 if v == targets[0, t] else 0.0)
            expected -= q * (z[v] - normalizer)
    np.testing.assert_allclose(
        next_token_loss(logprobs, mask), (expected, 2), rtol=1e-5
    )


def test_padding_is_irrelevant(rng):
    logprobs, mask = random_arguments(rng)
    invariants.assert_padding_is_irrelevant(next_token_loss, [logprobs], mask)


def test_batch_order_is_irrelevant_and_microbatches_sum_to_the_whole(rng):
    logprobs, mask = random_arguments(rng)
    whole = next_token_loss(logprobs, mask)
    order = rng.permutation(4)
    np.testing.assert_allclose(
        next_token_loss(logprobs[order], mask[order]), whole, rtol=1e-6
    )
    invariants.assert_microbatches_sum_to_the_whole(next_token_loss, [logprobs], mask)


def test_nothing_to_learn_gives_zero(rng):
    logprobs, mask = random_arguments(rng)
    total, count = next_token_loss(logprobs, np.zeros_like(mask))
    assert (float(total), float(count)) == (0.0, 0.0)


def test_jit_equals_eager(rng):
    invariants.assert_jit_equals_eager(next_token_loss, *random_arguments(rng))


def test_bfloat16_gives_float32(rng):
    logprobs, mask = random_arguments(rng)
    invariants.assert_bfloat16_gives_float32(next_token_loss, [logprobs], mask)


def test_wrong_shape_raises(rng):
    invariants.assert_wrong_shapes_raise(
        next_token_loss, list(random_arguments(rng)), ["x", "mask"]
    )

import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax.losses import logprobs_from_logits, next_token_loss, token_logprobs
from rlhf_jax.losses.supervised import dft
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "preference.npz"
REFERENCE = dict(np.load(FIXTURE))


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


def test_smoothed_labels_equal_transformers():
    """LabelSmoother of its Trainer: see make_preference_fixtures.py."""
    mask = REFERENCE["mask"][0]

    def mean(logits):
        logprobs, _ = logprobs_from_logits(
            *(logits, REFERENCE["targets"], mask),
            temperature=1.0,
            label_smoothing=0.1,
        )
        total, count = next_token_loss(logprobs, mask)
        return total / count

    got, gradient = jax.jit(jax.value_and_grad(mean))(REFERENCE["logits"])
    np.testing.assert_allclose(got, REFERENCE["label_smoothing/loss"], rtol=1e-5)
    expected = REFERENCE["label_smoothing/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


# dynamic fine-tuning


def test_dft_worked_by_hand():
    # ½ ln 2 + ¼ ln 4 = 0.3465736 + 0.3465736, and a certain token adds nothing
    logprobs = np.array([[np.log(0.5), np.log(0.25), np.nan], [0.0, np.inf, 1.0]])
    mask = np.array([[True, True, False], [True, False, False]])

    def loss(logprobs):
        total, count = dft(logprobs, mask)
        return total, count

    gradient, count = jax.grad(loss, has_aux=True)(logprobs.astype(np.float32))
    np.testing.assert_allclose(loss(logprobs)[0], 0.6931472, rtol=1e-6)
    assert float(count) == 3.0
    # -π of each token: the weight itself has no gradient
    expected = [[-0.5, -0.25, 0.0], [-1.0, 0.0, 0.0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_dft_equals_a_loop(rng):
    logprobs, mask = random_arguments(rng)
    expected = 0.0
    for i, t in zip(*np.nonzero(mask), strict=True):
        expected -= np.exp(float(logprobs[i, t])) * float(logprobs[i, t])
    np.testing.assert_allclose(dft(logprobs, mask), (expected, mask.sum()), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: dft(x, mask)[0]))(logprobs)
    np.testing.assert_allclose(
        gradient, np.where(mask, -np.exp(logprobs), 0.0), rtol=1e-5
    )


def test_dft_equals_trl():
    """SFTTrainer.compute_loss, gradients too: see make_preference_fixtures.py."""

    def mean(logprobs):
        B, T = logprobs.shape[1:]
        total, count = dft(
            logprobs.reshape(2 * B, T), REFERENCE["mask"].reshape(2 * B, T)
        )
        return total / count

    got, gradient = jax.jit(jax.value_and_grad(mean))(REFERENCE["logprobs"])
    np.testing.assert_allclose(got, REFERENCE["dft/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, REFERENCE["dft/gradient"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(("loss", "first"), [(next_token_loss, "x"), (dft, "logprobs")])
def test_wrong_shape_raises(rng, loss, first):
    invariants.assert_wrong_shapes_raise(
        loss, list(random_arguments(rng)), [first, "mask"]
    )

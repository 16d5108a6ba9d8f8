import functools

import jax
import numpy as np
import pytest

from rlhf_jax.losses import bradley_terry
from tests.losses import invariants


def with_everything(chosen, rejected, margin, targets, mask):
    """All array arguments given."""
    return bradley_terry(
        chosen, rejected, mask, centering=0.01, margin=margin, targets=targets
    )


def random_arguments(rng, B=6):
    chosen, rejected, margin = rng.normal(size=(3, B)).astype(np.float32)
    targets = rng.random(B).astype(np.float32)
    return [chosen, rejected, margin, targets], rng.random(B) < 0.7


def test_values_worked_by_hand():
    # σ(ln 3) = 3/4: the loss of a difference of ln 3 is -ln 3/4 = 0.2876821,
    # and of -ln 3 it is -ln 1/4 = 1.3862944; of 0 it is ln 2 = 0.6931472
    difference = np.float32(np.log(3))
    chosen = np.array([1.0, 1.0, 1.0], np.float32)
    rejected = chosen - np.array([difference, -difference, 0.0], np.float32)
    plain = [0.2876821, 1.3862944, 0.6931472]
    got = bradley_terry(chosen, rejected, centering=0.0)
    np.testing.assert_allclose(got, plain, rtol=1e-6)
    # a margin of ln 3 leaves differences of 0, -2 ln 3 and -ln 3: σ(-2 ln 3) = 1/10
    got = bradley_terry(chosen, rejected, centering=0.0, margin=np.full(3, difference))
    np.testing.assert_allclose(got, [0.6931472, 2.3025851, 1.3862944], rtol=1e-6)
    # labels smoothed by a tenth: 0.9 · 0.2876821 + 0.1 · 1.3862944 = 0.3975433 and
    # 0.9 · 1.3862944 + 0.1 · 0.2876821 = 1.2764332
    got = bradley_terry(chosen, rejected, centering=0.0, targets=0.9)
    np.testing.assert_allclose(got, [0.3975433, 1.2764332, 0.6931472], rtol=1e-6)
    # centering: rewards 1 and 1 - ln 3 = -0.0986123 add 0.5 · 0.9013877² = 0.4062499
    got = bradley_terry(chosen, rejected, centering=0.5)
    np.testing.assert_allclose(got[0], 0.2876821 + 0.4062499, rtol=1e-6)
    # a pair that is none costs nothing
    got = bradley_terry(chosen, rejected, np.array([True, False, True]), centering=0.0)
    np.testing.assert_allclose(got, [0.2876821, 0.0, 0.6931472], rtol=1e-6)


def test_equals_a_loop(rng):
    (chosen, rejected, margin, targets), mask = random_arguments(rng)

    def loss(chosen, rejected):
        losses = bradley_terry(
            chosen, rejected, mask, centering=0.05, margin=margin, targets=targets
        )
        return losses.sum(), losses

    gradients, losses = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        chosen, rejected
    )
    expected, slopes = np.zeros(6), np.zeros((2, 6))
    for i in np.flatnonzero(mask):
        r_c, r_r = float(chosen[i]), float(rejected[i])
        p, x = float(targets[i]), r_c - r_r - float(margin[i])
        likely = 1 / (1 + np.exp(-x))
        expected[i] = -p * np.log(likely) - (1 - p) * np.log(1 - likely)
        expected[i] += 0.05 * (r_c + r_r) ** 2
        slopes[0, i] = likely - p + 0.1 * (r_c + r_r)
        slopes[1, i] = p - likely + 0.1 * (r_c + r_r)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients, slopes, rtol=1e-5, atol=1e-6)


def test_defaults_are_no_margin_and_certain_labels(rng):
    (chosen, rejected, _, _), mask = random_arguments(rng)
    got = bradley_terry(chosen, rejected, centering=0.01)
    spelled_out = bradley_terry(
        chosen,
        rejected,
        np.ones(mask.shape, bool),
        centering=0.01,
        margin=np.zeros(mask.shape),
        targets=np.ones(mask.shape),
    )
    np.testing.assert_array_equal(got, spelled_out)


def test_far_apart_rewards_overflow_nothing():
    def loss(chosen):
        losses = bradley_terry(
            chosen, np.zeros(2, np.float32), centering=0.0, targets=0.9
        )
        return losses.sum(), losses

    gradient, losses = jax.jit(jax.grad(loss, has_aux=True))(
        np.array([1e4, -1e4], np.float32)
    )
    # 0.1 · 10⁴ and 0.9 · 10⁴; the slopes are 1 - 0.9 and 0 - 0.9
    np.testing.assert_allclose(losses, [1e3, 9e3], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.1, -0.9], rtol=1e-5)


def test_swapping_the_pair_mirrors_the_label(rng):
    (chosen, rejected, _, _), _ = random_arguments(rng)
    got = bradley_terry(chosen, rejected, centering=0.01, targets=0.8)
    mirrored = bradley_terry(rejected, chosen, centering=0.01, targets=0.2)
    np.testing.assert_allclose(got, mirrored, rtol=1e-5)


def test_padding_is_irrelevant(rng):
    arrays, mask = random_arguments(rng)
    invariants.assert_padding_is_irrelevant(with_everything, arrays, mask)


def test_pairs_are_independent(rng):
    arrays, mask = random_arguments(rng)
    invariants.assert_batch_order_is_irrelevant(with_everything, arrays, mask)
    invariants.assert_microbatches_sum_to_the_whole(with_everything, arrays, mask)


def test_jit_equals_eager(rng):
    arrays, mask = random_arguments(rng)
    invariants.assert_jit_equals_eager(with_everything, *arrays, mask)


def test_bfloat16_gives_float32(rng):
    arrays, mask = random_arguments(rng)
    invariants.assert_bfloat16_gives_float32(with_everything, arrays, mask)


def test_wrong_shape_raises(rng):
    (chosen, rejected, *_), mask = random_arguments(rng)
    pairs = functools.partial(bradley_terry, centering=0.01)
    invariants.assert_wrong_shapes_raise(
        pairs, [chosen, rejected, mask], ["chosen", "rejected", "mask"]
    )
    for name in ("margin", "targets"):
        with pytest.raises(
            ValueError, match=rf"{name} has shape \(5,\), expected \(6,"
        ):
            pairs(chosen, rejected, **{name: chosen[:5]})
    with pytest.raises(ValueError, match=r"chosen has shape \(6, 1\), expected \[B\]"):
        pairs(chosen[:, None], rejected[:, None])


def test_number_out_of_range_raises(rng):
    (chosen, rejected, *_), _ = random_arguments(rng)
    with pytest.raises(ValueError, match=r"centering is -1\.0, expected"):
        bradley_terry(chosen, rejected, centering=-1.0)
    with pytest.raises(ValueError, match=r"targets is 1\.1, expected"):
        bradley_terry(chosen, rejected, centering=0.0, targets=1.1)

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.losses import bradley_terry
from rlhf_jax.losses.preference import (
    implicit_rewards,
    ld_logprobs,
    sequence_logprobs,
    wpo_weights,
)
from tests.losses import invariants


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


def test_without_centering_the_largest_rewards_are_not_squared():
    # 2 · 10³⁰ squared is no float32, and zero times infinity is nan
    chosen, rejected = np.array([[2e30], [1e30]], np.float32)
    np.testing.assert_array_equal(bradley_terry(chosen, rejected, centering=0.0), [0.0])


def test_swapping_the_pair_mirrors_the_label(rng):
    (chosen, rejected, _, _), _ = random_arguments(rng)
    got = bradley_terry(chosen, rejected, centering=0.01, targets=0.8)
    mirrored = bradley_terry(rejected, chosen, centering=0.01, targets=0.2)
    np.testing.assert_allclose(got, mirrored, rtol=1e-5)


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


# what goes into dpo


def random_tokens(rng, B=5, T=6):
    logprobs = -rng.exponential(1.0, (2, B, T)).astype(np.float32)
    masks = [invariants.random_mask(rng, B, T), rng.random((B, T)) < 0.6]
    return list(logprobs), masks


def test_sequence_logprobs_worked_by_hand():
    # -0.5 - 1.5 over two tokens; one of -2; none
    logprobs = np.array([[-0.5, np.nan, -1.5], [-2.0, 0.5, np.inf], [1, 2, 3]])
    mask = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 0]], bool)
    sums, lengths = sequence_logprobs(logprobs.astype(np.float32), mask)
    np.testing.assert_array_equal(sums, [-2.0, -2.0, 0.0])
    np.testing.assert_array_equal(lengths, [2.0, 1.0, 0.0])


def test_ld_logprobs_worked_by_hand():
    # two tokens against three: the third, -4, counts a quarter: -0.5 - 1 - 1
    chosen = np.array([[-0.5, np.nan, -1.0, -4.0], [-1.0, -2.0, -3.0, 9.0]])
    chosen_mask = np.array([[1, 0, 1, 1], [1, 1, 1, 0]], bool)
    rejected = np.array([[-2.0, -3.0, np.inf], [-1.0, 7.0, 8.0]])
    rejected_mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    got = ld_logprobs(
        *(x.astype(np.float32) for x in (chosen, rejected)),
        *(chosen_mask, rejected_mask),
        alpha=0.25,
    )
    # in the second pair one token is shared: -1 - 0.25 · (2 + 3)
    np.testing.assert_allclose(got, [[-2.5, -2.25], [-5.0, -1.0]], rtol=1e-6)


def test_wpo_weights_worked_by_hand():
    # probabilities ½ and ⅛: their geometric mean is ¼; and a row of none
    logprobs = np.log(np.array([[0.5, 0.125, 0.3], [0.1, 0.2, 0.3]], np.float32))
    mask = np.array([[1, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_allclose(wpo_weights(logprobs, mask), [0.25, 1.0], rtol=1e-6)
    # Σ π² of ½ and ⅛: the weight is one
    got = wpo_weights(logprobs, mask, log_sum_squares=logprobs)
    np.testing.assert_allclose(got, [1.0, 1.0], rtol=1e-6)


def test_implicit_rewards_worked_by_hand():
    # 0.5 · (-1 + 3) = 1 and 0.5 · (-4 + 5) = 0.5; the other way round; no pair
    got = implicit_rewards(
        np.array([-1.0, -4.0, np.nan], np.float32),
        np.array([-4.0, -1.0, 1.0], np.float32),
        np.array([-3.0, -5.0, 1.0], np.float32),
        np.array([-5.0, -3.0, np.inf], np.float32),
        np.array([True, True, False]),
        beta=0.5,
    )
    np.testing.assert_array_equal(got.chosen, [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(got.rejected, [0.5, 1.0, 0.0])
    np.testing.assert_array_equal(got.margin, [0.5, -0.5, 0.0])
    np.testing.assert_array_equal(got.correct, [True, False, False])


def test_token_summaries_equal_a_loop(rng):
    (chosen, rejected), (chosen_mask, rejected_mask) = random_tokens(rng)
    squares = -rng.exponential(1.0, chosen.shape).astype(np.float32)
    ld = ld_logprobs(chosen, rejected, chosen_mask, rejected_mask, alpha=0.3)
    sums, lengths = sequence_logprobs(chosen, chosen_mask)
    weights = wpo_weights(chosen, chosen_mask, log_sum_squares=squares)
    for i in range(len(chosen)):
        real = np.flatnonzero(chosen_mask[i])
        other = np.flatnonzero(rejected_mask[i])
        np.testing.assert_allclose(sums[i], sum(chosen[i, real]), rtol=1e-6)
        assert lengths[i] == len(real)
        n = min(len(real), len(other))
        expected = sum(chosen[i, real[:n]]) + 0.3 * sum(chosen[i, real[n:]])
        np.testing.assert_allclose(ld[0][i], expected, rtol=1e-6)
        expected = sum(rejected[i, other[:n]]) + 0.3 * sum(rejected[i, other[n:]])
        np.testing.assert_allclose(ld[1][i], expected, rtol=1e-6)
        ratio = np.exp(np.float64(chosen[i, real])) / np.exp(squares[i, real])
        expected = np.prod(ratio) ** (1 / max(len(real), 1))
        np.testing.assert_allclose(weights[i], expected, rtol=1e-5)


def test_ld_logprobs_at_one_are_the_sums_and_at_zero_are_cut_alike(rng):
    arrays, masks = random_tokens(rng)
    got = ld_logprobs(*arrays, *masks, alpha=1.0)
    for x, logprobs, mask in zip(got, arrays, masks, strict=True):
        np.testing.assert_allclose(x, sequence_logprobs(logprobs, mask)[0], rtol=1e-6)
    ones = [np.ones_like(x) for x in arrays]
    got = ld_logprobs(*ones, *masks, alpha=0.0)
    np.testing.assert_array_equal(*got)


def test_weights_and_rewards_carry_no_gradient(rng):
    (chosen, rejected), (mask, _) = random_tokens(rng)

    def total(x, y):
        rewards = implicit_rewards(x[:, 0], y[:, 0], x[:, 1], y[:, 1], beta=0.1)
        weights = wpo_weights(x, mask, log_sum_squares=y)
        return weights.sum() + sum(r.sum() for r in rewards[:3])

    for gradient in jax.grad(total, argnums=(0, 1))(chosen, rejected):
        assert not np.asarray(gradient).any()


def test_implicit_rewards_of_a_wrong_shape_raise(rng):
    arrays, mask = random_arguments(rng)
    function = functools.partial(implicit_rewards, beta=0.3)
    names = ["chosen_logprobs", "rejected_logprobs"]
    names += ["ref_chosen_logprobs", "ref_rejected_logprobs", "mask"]
    invariants.assert_wrong_shapes_raise(function, [*arrays, mask], names)


def test_wrong_shapes_of_tokens_raise(rng):
    (chosen, rejected), (mask, rejected_mask) = random_tokens(rng)
    invariants.assert_wrong_shapes_raise(
        sequence_logprobs, [chosen, mask], ["logprobs", "mask"]
    )
    invariants.assert_wrong_shapes_raise(
        lambda x, m, y: wpo_weights(x, m, log_sum_squares=y),
        [chosen, mask, rejected],
        ["logprobs", "mask", "log_sum_squares"],
    )
    with pytest.raises(ValueError, match=r"logprobs has shape \(5,\), expected \[B, T"):
        sequence_logprobs(chosen[:, 0], mask[:, 0])
    ld = functools.partial(ld_logprobs, alpha=0.5)
    with pytest.raises(ValueError, match=r"chosen_mask has shape \(5, 5\), expected"):
        ld(chosen, rejected, mask[:, 1:], rejected_mask)
    with pytest.raises(ValueError, match=r"rejected_mask has shape \(5, 5\), expected"):
        ld(chosen, rejected, mask, rejected_mask[:, 1:])
    with pytest.raises(ValueError, match=r"rejected_logprobs has shape \(4, 6\)"):
        ld(chosen, rejected[1:], mask, rejected_mask[1:])
    with pytest.raises(ValueError, match=r"alpha is 1\.5, expected"):
        ld_logprobs(chosen, rejected, mask, rejected_mask, alpha=1.5)

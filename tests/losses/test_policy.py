import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import (
    adaptive_kl_coef,
    clipped_surrogate,
    clipped_value_loss,
    kl_shaped_rewards,
    missing_eos_penalty,
)
from tests.losses import invariants

surrogate = functools.partial(
    clipped_surrogate, clip_low=0.2, clip_high=0.3, dual_clip=3.0
)
value_loss = functools.partial(clipped_value_loss, clip_range=0.2)


KERNELS = {"surrogate": surrogate, "value_loss": value_loss}
ARRAYS = {
    "surrogate": ["logprobs", "old_logprobs", "advantages", "mask"],
    "value_loss": ["values", "old_values", "returns", "mask"],
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def random_arguments(rng, B=4, T=6):
    arrays = list(rng.normal(0.0, 0.5, (3, B, T)).astype(np.float32))
    return arrays, invariants.random_mask(rng, B, T)


def surrogate_of_ratios(ratios, advantages, **hyper_parameters):
    """Loss, gradient in log π, and diagnostics, for given ratios π/π_old."""
    old_logprobs = np.full(np.shape(ratios), -1.5, np.float32)
    logprobs = (old_logprobs + np.log(ratios)).astype(np.float32)
    mask = np.ones(logprobs.shape, bool)
    advantages = np.asarray(advantages, np.float32)

    def loss(logprobs):
        losses, diagnostics = clipped_surrogate(
            logprobs, old_logprobs, advantages, mask, **hyper_parameters
        )
        return losses.sum(), (losses, diagnostics)

    gradient, (losses, diagnostics) = jax.jit(jax.grad(loss, has_aux=True))(logprobs)
    return losses, gradient, diagnostics


# the clipped surrogate


def test_surrogate_worked_by_hand():
    # clip 0.2, advantages 2 and -2, ratios 0.5, 1.1 and 1.5
    losses, _, diagnostics = surrogate_of_ratios(
        [[0.5, 1.1, 1.5], [0.5, 1.1, 1.5]],
        [[2.0, 2.0, 2.0], [-2.0, -2.0, -2.0]],
        clip_low=0.2,
        clip_high=0.2,
    )
    expected = [
        # A = 2: max(-1, -1.6) = -1;  max(-2.2, -2.2) = -2.2;  max(-3, -2.4) = -2.4
        [-1.0, -2.2, -2.4],
        # A = -2: max(1, 1.6) = 1.6;  max(2.2, 2.2) = 2.2;  max(3, 2.4) = 3
        [1.6, 2.2, 3.0],
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    clipped = [[False, False, True], [True, False, False]]
    np.testing.assert_array_equal(diagnostics.clipped, clipped)
    np.testing.assert_allclose(diagnostics.ratio, [[0.5, 1.1, 1.5]] * 2, rtol=1e-6)
    # half the squares of ln 0.5 = -0.6931472, ln 1.1 = 0.0953102, ln 1.5 = 0.4054651
    np.testing.assert_allclose(
        diagnostics.approx_kl, [[0.2402265, 0.00454202, 0.0822010]] * 2, rtol=1e-5
    )


def test_dual_clip_worked_by_hand():
    # A = -2 and ratio 5: the loss is 10 without, and at most 3 · 2 = 6 with c = 3;
    # with ratio 2 it is 4, under the bound; A = 2 has no such bound
    ratios, advantages = [[5.0, 2.0, 0.1]], [[-2.0, -2.0, 2.0]]
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    losses, _, _ = surrogate_of_ratios(ratios, advantages, **clip)
    np.testing.assert_allclose(losses, [[10.0, 4.0, -0.2]], rtol=1e-6)
    losses, gradient, diagnostics = surrogate_of_ratios(
        ratios, advantages, **clip, dual_clip=3.0
    )
    np.testing.assert_allclose(losses, [[6.0, 4.0, -0.2]], rtol=1e-6)
    # ∂(-A r)/∂ log π = -A r where no clip is active: 4 and -0.2
    np.testing.assert_allclose(gradient, [[0.0, 4.0, -0.2]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics.clipped, [[True, False, False]])


def loop_surrogate(logprobs, old_logprobs, advantages, mask, low, high, dual_clip):
    losses, slopes = np.zeros(mask.shape), np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        A = float(advantages[i, t])
        r = float(np.exp(np.float64(logprobs[i, t]) - np.float64(old_logprobs[i, t])))
        losses[i, t], slopes[i, t] = -A * r, -A * r
        # improving beyond the trust region is worth no more
        if A > 0 and r > 1 + high:
            losses[i, t], slopes[i, t] = -A * (1 + high), 0.0
        if A < 0 and r < 1 - low:
            losses[i, t], slopes[i, t] = -A * (1 - low), 0.0
        if A < 0 and r > dual_clip:
            losses[i, t], slopes[i, t] = -A * dual_clip, 0.0
    return losses, slopes


def test_surrogate_equals_a_loop(rng):
    logprobs, old_logprobs, advantages = rng.normal(size=(3, 20, 10)).astype(np.float32)
    mask = invariants.random_mask(rng, 20, 10)

    def loss(logprobs):
        losses, diagnostics = surrogate(logprobs, old_logprobs, advantages, mask)
        return losses.sum(), (losses, diagnostics)

    gradient, (losses, diagnostics) = jax.jit(jax.grad(loss, has_aux=True))(logprobs)
    expected, slopes = loop_surrogate(
        logprobs, old_logprobs, advantages, mask, 0.2, 0.3, 3.0
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(diagnostics.clipped, mask & (slopes == 0))
    assert diagnostics.clipped.any() and (slopes != 0).any()


def test_gradient_is_cut_only_where_the_ratio_moved_the_way_of_the_advantage():
    # columns: below 1 - 0.3, at its side of one, one, the other side, above 1 + 0.4
    ratios = [0.5, 0.75, 1.0, 1.25, 1.5]
    # a good token needs no more push once it is likelier, a bad one once it is rarer;
    # every other gradient is -A r
    cut = np.array([[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]], bool)
    advantages = np.array([[2.0] * 5, [-2.0] * 5])
    _, gradient, diagnostics = surrogate_of_ratios(
        [ratios, ratios], advantages, clip_low=0.3, clip_high=0.4
    )
    expected = np.where(cut, 0.0, -advantages * np.array([ratios, ratios]))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_array_equal(diagnostics.clipped, cut)


def test_ratio_one_gives_the_vanilla_policy_gradient(rng):
    (logprobs, _, advantages), mask = random_arguments(rng)

    def loss(logprobs, old_logprobs):
        losses, diagnostics = surrogate(logprobs, old_logprobs, advantages, mask)
        return losses.sum(), diagnostics

    gradient, diagnostics = jax.jit(jax.grad(loss, has_aux=True))(logprobs, logprobs)
    np.testing.assert_array_equal(gradient, np.where(mask, -advantages, 0.0))
    np.testing.assert_array_equal(diagnostics.ratio, np.ones(mask.shape))
    assert not diagnostics.clipped.any()
    assert not np.asarray(diagnostics.approx_kl).any()


def test_a_broken_sample_overflows_nothing():
    losses, gradient, diagnostics = surrogate_of_ratios(
        np.exp(np.array([[-80.0, 80.0, 80.0]])),
        [[1.0, 1.0, -1.0]],
        clip_low=0.2,
        clip_high=0.2,
    )
    # beyond 20 the ratio is e^±20, without gradient; e²⁰ = 4.8516520e8
    np.testing.assert_allclose(losses, [[-np.exp(-20.0), -1.2, 4.8516520e8]], rtol=1e-6)
    np.testing.assert_array_equal(gradient, [[0.0, 0.0, 0.0]])
    assert np.isfinite(diagnostics.approx_kl).all()


def test_diagnostics_carry_no_gradient(rng):
    arrays, mask = random_arguments(rng)

    def total(logprobs):
        _, diagnostics = surrogate(logprobs, *arrays[1:], mask)
        return diagnostics.ratio.sum() + diagnostics.approx_kl.sum()

    assert not np.asarray(jax.jit(jax.grad(total))(arrays[0])).any()


# the clipped value loss


def test_value_loss_worked_by_hand():
    # V_old = 1, range 0.5, so V is held in [0.5, 1.5]
    values = np.array([[1.2, 2.0, 2.0, 0.0]], np.float32)
    returns = np.array([[2.0, 3.0, 1.0, 1.0]], np.float32)
    mask, old_values = np.ones((1, 4), bool), np.ones((1, 4), np.float32)

    def loss(values):
        losses, clipped = clipped_value_loss(
            values, old_values, returns, mask, clip_range=0.5
        )
        return losses.sum(), (losses, clipped)

    gradient, (losses, clipped) = jax.jit(jax.grad(loss, has_aux=True))(values)
    # inside: ½ 0.8² = 0.32.  held at 1.5 with return 3: ½ max(1, 1.5²) = 1.125
    # held at 1.5 with return 1: ½ max(1, 0.25) = 0.5.  held at 0.5: ½ max(1, 0.25)
    np.testing.assert_allclose(losses, [[0.32, 1.125, 0.5, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False, True, False, False]])
    # V - R where no clip is active
    np.testing.assert_allclose(gradient, [[-0.8, 0.0, 1.0, -1.0]], rtol=1e-6)


def test_value_loss_without_a_range_is_half_the_squared_error(rng):
    (values, old_values, returns), mask = random_arguments(rng)
    losses, clipped = clipped_value_loss(
        values, old_values, returns, mask, clip_range=None
    )
    expected = np.where(mask, 0.5 * (values - returns) ** 2, 0.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert not clipped.any()


def test_value_loss_equals_a_loop(rng):
    (values, old_values, returns), mask = random_arguments(rng)

    def loss(values):
        losses, clipped = value_loss(values, old_values, returns, mask)
        return losses.sum(), (losses, clipped)

    gradient, (losses, clipped) = jax.jit(jax.grad(loss, has_aux=True))(values)
    expected, slopes = np.zeros(mask.shape), np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        V, V_old, R = (float(x[i, t]) for x in (values, old_values, returns))
        held = min(max(V, V_old - 0.2), V_old + 0.2)
        if (held - R) ** 2 > (V - R) ** 2:
            expected[i, t] = (held - R) ** 2 / 2
        else:
            expected[i, t], slopes[i, t] = (V - R) ** 2 / 2, V - R
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(clipped, mask & (slopes == 0))


@each_kernel
def test_wrong_shape_raises(rng, kernel):
    arrays, mask = random_arguments(rng)
    invariants.assert_wrong_shapes_raise(
        KERNELS[kernel], [*arrays, mask], ARRAYS[kernel]
    )


@pytest.mark.parametrize(
    ("name", "value"), [("clip_low", 1.1), ("clip_high", -0.1), ("dual_clip", 0.9)]
)
def test_clip_out_of_range_raises(rng, name, value):
    arrays, mask = random_arguments(rng)
    arguments = {"clip_low": 0.2, "clip_high": 0.2, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        clipped_surrogate(*arrays, mask, **arguments)


def test_negative_value_range_raises(rng):
    arrays, mask = random_arguments(rng)
    with pytest.raises(ValueError, match=r"clip_range is -0\.2, expected"):
        clipped_value_loss(*arrays, mask, clip_range=-0.2)


# rewards


def test_shaped_rewards_worked_by_hand():
    scores = np.array([0.73, -1.9, 5.0], np.float32)
    kl = np.array([[1.0, 2.0, 3.0, np.nan], [4.0, np.inf, 6.0, 7.0], [1.0] * 4])
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
    got = kl_shaped_rewards(scores, kl, mask, kl_coef=0.1)
    expected = [
        # the end of the first row is its third token: -0.1 · 3 + 0.73 = 0.43
        [-0.1, -0.2, 0.43, 0.0],
        # a gap, and the end is the fourth: -0.1 · 7 - 1.9 = -2.6
        [-0.4, 0.0, -0.6, -2.6],
        # nothing real, so no score either
        [0.0, 0.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_shaped_rewards_equal_a_loop(rng):
    scores = rng.normal(size=5).astype(np.float32)
    kl = rng.normal(size=(5, 7)).astype(np.float32)
    mask = invariants.random_mask(rng, 5, 7)
    expected = np.zeros(mask.shape)
    for i in range(5):
        for t in range(7):
            if mask[i, t]:
                expected[i, t] = -0.3 * kl[i, t]
                if not any(mask[i, t + 1 :]):
                    expected[i, t] += scores[i]
    got = kl_shaped_rewards(scores, kl, mask, kl_coef=0.3)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_shaped_rewards_are_float_whatever_the_scores_are():
    for dtype in (np.int32, np.float16, jnp.bfloat16):
        got = kl_shaped_rewards(
            jnp.array([1, -2], dtype),
            np.array([[5, 5], [5, 5]]),
            np.ones((2, 2), np.int32),
            kl_coef=0.1,
        )
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, [[-0.5, 0.5], [-0.5, -2.5]], rtol=1e-6)


def test_shaped_rewards_take_a_coefficient_that_adapts(rng):
    (scores, kl, _), mask = random_arguments(rng)
    expected = kl_shaped_rewards(scores[:, 0], kl, mask, kl_coef=0.25)
    traced = jax.jit(
        lambda coef: kl_shaped_rewards(scores[:, 0], kl, mask, kl_coef=coef)
    )
    np.testing.assert_allclose(traced(np.float32(0.25)), expected, rtol=1e-6)


def test_shaped_rewards_of_a_wrong_shape_raise():
    kl, mask = np.zeros((2, 3)), np.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"scores has shape \(3,\), expected \(2,\)"):
        kl_shaped_rewards(np.zeros(3), kl, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\), expected \(2, 3\)"):
        kl_shaped_rewards(np.zeros(2), kl, mask[:, :2], kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl has shape \(2,\), expected \[B, T\]"):
        kl_shaped_rewards(np.zeros(2), kl[:, 0], mask[:, 0], kl_coef=0.1)


def test_missing_eos_penalty_worked_by_hand():
    # cut off with 3: 3 - 1.5 = 1.5; ended by itself: 3 as it was
    got = missing_eos_penalty(np.array([3, 3]), np.array([False, True]), penalty=1.5)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [1.5, 3.0])


def test_missing_eos_penalty_equals_a_loop(rng):
    scores = rng.normal(size=8).astype(np.float32)
    finished = rng.random(8) < 0.5
    expected = [
        s if done else s - 0.7 for s, done in zip(scores, finished, strict=True)
    ]
    function = functools.partial(missing_eos_penalty, penalty=0.7)
    np.testing.assert_allclose(function(scores, finished), expected, rtol=1e-6)
    invariants.assert_jit_equals_eager(function, scores, finished)
    invariants.assert_bfloat16_gives_float32(function, [scores], finished)
    invariants.assert_batch_order_is_irrelevant(function, [scores], finished)
    invariants.assert_wrong_shapes_raise(
        function, [scores, finished], ["scores", "finished"]
    )


# the KL controller


def test_adaptive_kl_coef_worked_by_hand():
    control = functools.partial(
        adaptive_kl_coef, target=6.0, horizon=10000, num_samples=512
    )
    # 6.6 / 6 - 1 = 0.1:  0.15 · (1 + 0.1 · 0.0512) = 0.150768
    np.testing.assert_allclose(control(0.15, 6.6), 0.150768, rtol=1e-6)
    # far above and far below, held at ±0.2:  0.15 · (1 ± 0.01024)
    np.testing.assert_allclose(control(0.15, 60.0), 0.151536, rtol=1e-6)
    np.testing.assert_allclose(control(0.15, -1.0), 0.148464, rtol=1e-6)
    np.testing.assert_allclose(control(0.15, 6.0), 0.15, rtol=1e-6)
    got = jax.jit(control)(jnp.bfloat16(0.5), jnp.bfloat16(6.0))
    assert got.dtype == jnp.float32
    assert float(got) == 0.5


def test_adaptive_kl_coef_equals_a_loop(rng):
    coef, expected = jnp.float32(0.2), 0.2
    control = jax.jit(
        functools.partial(adaptive_kl_coef, target=2.0, horizon=1000, num_samples=64)
    )
    for kl in rng.uniform(0.0, 5.0, 50).astype(np.float32):
        coef = control(coef, kl)
        error = min(max(float(kl) / 2.0 - 1.0, -0.2), 0.2)
        expected *= 1.0 + error * 64 / 1000
    np.testing.assert_allclose(coef, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 0.0}, "target is 0.0, expected"),
        ({"horizon": -1}, "horizon is -1, expected"),
        ({"num_samples": 501}, r"num_samples is 501, expected a number in \[0, 500\]"),
        ({"observed_kl": np.zeros(3)}, r"observed_kl has shape \(3,\), expected \(\)"),
    ],
)
def test_controller_with_bad_arguments_raises(change, message):
    arguments = {"kl_coef": 0.1, "observed_kl": 1.0, "target": 6.0, "horizon": 100}
    with pytest.raises(ValueError, match=message):
        adaptive_kl_coef(**(arguments | {"num_samples": 10} | change))

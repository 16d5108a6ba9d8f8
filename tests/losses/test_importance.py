import functools
import itertools
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax.losses.importance import importance_weights
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "policy.npz"
CASES = list(itertools.product(("token", "sequence"), ("truncate", "mask")))
NAMES = ["old_logprobs", "rollout_logprobs", "mask"]
each_case = pytest.mark.parametrize(("level", "mode"), CASES)


@functools.cache  # one function object a case, so that jit compiles it once
def weights_of(level, mode, low=0.5, high=1.5):
    return functools.partial(
        importance_weights, level=level, mode=mode, low=low, high=high
    )


def random_arguments(rng, B=6, T=5):
    old_logprobs = -rng.exponential(1.0, (B, T))
    rollout_logprobs = old_logprobs + rng.normal(0.0, 0.5, (B, T))
    arrays = [x.astype(np.float32) for x in (old_logprobs, rollout_logprobs)]
    return arrays, invariants.random_mask(rng, B, T)


def test_worked_by_hand():
    # ratios of the first row 2, 1/4 and 1, their product 1/2; the second row's 1.2
    # and padding
    ratios = np.array([[2.0, 0.25, 1.0], [1.2, 7.0, 7.0]])
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    rollout_logprobs = np.full((2, 3), -1.0, np.float32)
    old_logprobs = (rollout_logprobs + np.log(ratios)).astype(np.float32)
    expected = {
        ("token", "truncate"): [[1.5, 0.4, 1.0], [1.2, 0.0, 0.0]],
        ("token", "mask"): [[0.0, 0.0, 1.0], [1.2, 0.0, 0.0]],
        ("sequence", "truncate"): [[0.5, 0.5, 0.5], [1.2, 0.0, 0.0]],
        ("sequence", "mask"): [[0.5, 0.5, 0.5], [1.2, 0.0, 0.0]],
    }
    for case in CASES:
        got = weights_of(*case, low=0.4)(old_logprobs, rollout_logprobs, mask)
        np.testing.assert_allclose(got, expected[case], rtol=1e-6, err_msg=str(case))
    # the product 1/2 lies below 0.6, and 1.2 within
    low = {"truncate": [[0.6] * 3, [1.2, 0, 0]], "mask": [[0] * 3, [1.2, 0, 0]]}
    for mode, rows in low.items():
        got = weights_of("sequence", mode, low=0.6)(
            old_logprobs, rollout_logprobs, mask
        )
        np.testing.assert_allclose(got, rows, rtol=1e-6)


@each_case
def test_equals_a_loop(rng, level, mode):
    (old, rollout), mask = random_arguments(rng, B=12)
    expected = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        tokens = [t] if level == "token" else np.nonzero(mask[i])[0]
        ratio = 1.0
        for s in tokens:
            ratio *= np.exp(np.float64(old[i, s])) / np.exp(np.float64(rollout[i, s]))
        if mode == "truncate":
            expected[i, t] = min(max(ratio, 0.5), 1.5)
        elif 0.5 <= ratio <= 1.5:
            expected[i, t] = ratio
    got = jax.jit(weights_of(level, mode))(old, rollout, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert (got[mask] != 1.0).all() and len(np.unique(got)) > 4


@each_case
def test_equals_verl(level, mode):
    """verl truncates from above alone, and rejects on both sides."""
    fixture = np.load(FIXTURE)
    function = weights_of(level, mode, low=0.0 if mode == "truncate" else 0.5)
    got = function(
        fixture["old_logprobs"], fixture["rollout_logprobs"], fixture["mask"]
    )
    expected = fixture[f"verl/weights/{level}_{mode}"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    if mode == "mask":
        assert (expected[fixture["mask"]] == 0).any() and (expected > 0).any()
    else:
        assert (expected == 1.5).any()


@each_case
def test_equal_policies_weigh_one(rng, level, mode):
    (old, _), mask = random_arguments(rng)
    got = weights_of(level, mode)(old, old, mask)
    np.testing.assert_array_equal(got, mask.astype(np.float32))


def test_no_bounds_and_one_token_make_all_cases_the_same(rng):
    (old, rollout), _ = random_arguments(rng, T=1)
    mask = np.ones((6, 1), bool)
    expected = np.exp(old - rollout)
    for case in CASES:
        got = weights_of(*case, low=0.0, high=float("inf"))(old, rollout, mask)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@each_case
def test_a_broken_sample_overflows_nothing(level, mode):
    old = np.array([[-500.0, -1.0], [-1.0, -1.0]], np.float32)
    mask = np.ones((2, 2), bool)
    unbounded = weights_of(level, mode, low=0.0, high=float("inf"))
    got = unbounded(old, old[::-1], mask)
    assert np.isfinite(got).all()
    # e⁻²⁰ and e²⁰ are the least and the most a log-ratio can give
    np.testing.assert_allclose(got[:, 0], [2.0611536e-9, 4.8516520e8], rtol=1e-6)


@each_case
def test_weights_carry_no_gradient(rng, level, mode):
    arrays, mask = random_arguments(rng)
    total = jax.jit(
        jax.grad(lambda x, y: weights_of(level, mode)(x, y, mask).sum(), (0, 1))
    )
    for gradient in total(*arrays):
        assert not np.asarray(gradient).any()


@each_case
def test_wrong_shape_raises(rng, level, mode):
    arrays, mask = random_arguments(rng)
    invariants.assert_wrong_shapes_raise(
        weights_of(level, mode), [*arrays, mask], NAMES
    )
    with pytest.raises(
        ValueError, match=r"old_logprobs has shape \(5,\), expected \[B"
    ):
        weights_of(level, mode)(*(x[0] for x in arrays), mask[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "batch"}, "level is 'batch', expected one of token, sequence"),
        ({"mode": "clip"}, "mode is 'clip', expected one of truncate, mask"),
        ({"low": 1.2}, r"low is 1\.2, expected a number in \[0\.0, 1\.0\]"),
        ({"high": 0.2}, r"high is 0\.2, expected a number in \[1\.0, inf\]"),
    ],
)
def test_bad_arguments_raise(rng, change, message):
    arrays, mask = random_arguments(rng)
    arguments = {"level": "token", "mode": "mask", "low": 0.5, "high": 2.0} | change
    with pytest.raises(ValueError, match=message):
        importance_weights(*arrays, mask, **arguments)

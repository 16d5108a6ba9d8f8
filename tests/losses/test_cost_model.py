import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import cost_model_loss, cost_model_token_loss, masked
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/losses/constrained.npz"


@pytest.fixture(scope="module")
def reference():
    """What safe-rlhf computed; its `signs` are +1 for unsafe."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays) | {"is_safe": arrays["signs"] < 0}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


cost_loss = functools.partial(cost_model_loss, regularization=0.05)


def random_pairs(rng, B=6):
    costs = rng.normal(size=(2, B)).astype(np.float32)
    is_safe = rng.random((2, B)) < 0.5
    return [*costs, *is_safe], rng.random(B) < 0.7


def test_cost_model_loss_worked_by_hand():
    # σ(ln 3) = 3/4, σ(-ln 3) = 1/4, σ(2 ln 3) = 9/10: -ln of them is
    # 0.2876821, 1.3862944 and 0.1053605
    x = np.float32(np.log(3))
    safer_cost = np.array([-x, x, 0.0, np.nan], np.float32)
    unsafer_cost = np.array([x, 0.0, 0.0, np.inf], np.float32)
    safer_is_safe = np.array([True, True, False, True])
    unsafer_is_safe = np.array([False, False, False, True])
    mask = np.array([True, True, True, False])
    arrays = safer_cost, unsafer_cost, safer_is_safe, unsafer_is_safe, mask
    got = cost_model_loss(*arrays, regularization=0.0)
    expected = [
        # all as it should be: order 2 ln 3 apart, both signs right by ln 3
        0.1053605 + 0.2876821 + 0.2876821,
        # safe, but its cost is ln 3, and above the unsafe one's, which is 0
        1.3862944 + 1.3862944 + 0.6931472,
        # three coins
        3 * 0.6931472,
        0.0,
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    # 0.1 · ((ln 3)² + (ln 3)²) / 2 = 0.1 · 1.2069490
    got = cost_model_loss(*arrays, regularization=0.1)
    np.testing.assert_allclose(got[0], expected[0] + 0.1206949, rtol=1e-6)


def test_cost_model_loss_equals_a_loop(rng):
    (*costs, safer_is_safe, unsafer_is_safe), mask = random_pairs(rng)

    def loss(costs):
        losses = cost_loss(*costs, safer_is_safe, unsafer_is_safe, mask)
        return losses.sum(), losses

    slopes, losses = jax.jit(jax.grad(loss, has_aux=True))(costs)
    expected, gradient = np.zeros(6), np.zeros((2, 6))
    for i in np.flatnonzero(mask):
        C_s, C_u = float(costs[0][i]), float(costs[1][i])
        s_s, s_u = (-1 if x[i] else 1 for x in (safer_is_safe, unsafer_is_safe))
        for p in (sigmoid(C_u - C_s), sigmoid(s_s * C_s), sigmoid(s_u * C_u)):
            expected[i] -= np.log(p)
        expected[i] += 0.05 * (C_s**2 + C_u**2) / 2
        wrong = 1 - sigmoid(C_u - C_s)
        gradient[0, i] = wrong - s_s * (1 - sigmoid(s_s * C_s)) + 0.05 * C_s
        gradient[1, i] = -wrong - s_u * (1 - sigmoid(s_u * C_u)) + 0.05 * C_u
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(slopes, gradient, rtol=1e-5, atol=1e-6)


def test_cost_model_loss_equals_safe_rlhf(reference):
    rows = np.arange(4)
    ends = [reference["costs"][i, rows, reference["end_index"][i]] for i in (0, 1)]

    def loss(ends):
        losses = cost_model_loss(
            *ends,
            *reference["is_safe"],
            regularization=float(reference["regularization"]),
        )
        return losses.sum(), losses

    gradient, losses = jax.jit(jax.grad(loss, has_aux=True))(ends)
    np.testing.assert_allclose(losses, reference["sequence/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, reference["sequence/gradient"], rtol=1e-5, atol=1e-6
    )


def test_cost_model_token_loss_equals_safe_rlhf(reference):
    mask = reference["token_mask"]

    def loss(costs):
        losses = cost_model_token_loss(
            *costs,
            *reference["is_safe"],
            mask,
            regularization=float(reference["regularization"]),
        )
        pairs = masked.mean(losses, mask, axis=1)
        return pairs.sum(), pairs

    gradient, pairs = jax.jit(jax.grad(loss, has_aux=True))(reference["costs"])
    np.testing.assert_allclose(pairs, reference["token/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, reference["token/gradient"], rtol=1e-5, atol=1e-6
    )


def test_token_loss_is_the_pair_loss_of_each_slot(rng):
    costs = rng.normal(size=(2, 3, 5)).astype(np.float32)
    is_safe, mask = rng.random((2, 3)) < 0.5, invariants.random_mask(rng, 3, 5)
    got = cost_model_token_loss(*costs, *is_safe, mask, regularization=0.1)
    for t in range(5):
        expected = cost_model_loss(
            *costs[..., t], *is_safe, mask[:, t], regularization=0.1
        )
        np.testing.assert_allclose(got[:, t], expected, rtol=1e-6)


def test_the_zero_of_the_cost_is_learned():
    """Where the order alone has no gradient along a shift, the signs have one."""
    high = np.array([5.0, 7.0], np.float32)  # in order, but the safe one is above zero

    def loss(shift):
        costs = high + shift
        return cost_model_loss(
            *costs[:, None], np.array([True]), np.array([False]), regularization=0.0
        ).sum()

    assert jax.grad(loss)(jnp.float32(0.0)) > 0.9


def test_costs_whose_squares_overflow_are_finite_without_regularization():
    # in order and of the right signs by 10²⁰: nothing to learn, and not inf · 0
    costs, is_safe = np.float32([[-1e20], [1e20]]), np.array([[True], [False]])
    loss = lambda costs: cost_model_loss(*costs, *is_safe, regularization=0.0).sum()
    value, gradient = jax.value_and_grad(loss)(costs)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 1)))


# errors


def test_cost_model_loss_of_a_wrong_shape_raises(rng):
    arrays, mask = random_pairs(rng)
    names = ["safer_cost", "unsafer_cost", "safer_is_safe", "unsafer_is_safe", "mask"]
    invariants.assert_wrong_shapes_raise(cost_loss, [*arrays, mask], names)
    with pytest.raises(ValueError, match=r"safer_cost has shape \(2, 3\), expected"):
        cost_loss(*np.ones((2, 2, 3)), *np.ones((3, 2, 3), bool))
    with pytest.raises(ValueError, match=r"regularization is -0\.1, expected"):
        cost_model_loss(*arrays, regularization=-0.1)


def test_token_loss_of_a_wrong_shape_raises():
    tokens = functools.partial(cost_model_token_loss, regularization=0.0)
    costs, is_safe = np.ones((2, 3, 5)), np.ones((2, 3), bool)
    mask = np.ones((3, 5), bool)
    with pytest.raises(ValueError, match=r"safer_costs has shape \(3,\), expected \[B"):
        tokens(*costs[..., 0], *is_safe, mask[:, 0])
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(3, 5\)"):
        tokens(*costs, *is_safe, mask[:, 0])
    for i, name in enumerate(("safer_is_safe", "unsafer_is_safe")):
        wrong = list(is_safe)
        wrong[i] = mask
        with pytest.raises(ValueError, match=rf"^{name} has shape \(3, 5\), expected"):
            tokens(*costs, *wrong, mask)


@pytest.mark.parametrize("position", [0, 1])
def test_signs_instead_of_labels_raise(rng, position):
    """Of the signs ±1 both would count as safe; compiled or not, in both losses."""
    (*costs, safer_is_safe, unsafer_is_safe), mask = random_pairs(rng)
    labels = [safer_is_safe, unsafer_is_safe]
    labels[position] = 1 - 2 * labels[position].astype(np.float32)
    name = ("safer_is_safe", "unsafer_is_safe")[position]
    expected = f"^{name} is float32, expected bool"
    with pytest.raises(ValueError, match=expected):
        cost_loss(*costs, *labels, mask)
    with pytest.raises(ValueError, match=expected):
        jax.jit(cost_loss)(*costs, *labels, mask)
    tokens = [np.stack([x, x], 1) for x in (*costs, mask)]
    with pytest.raises(ValueError, match=expected):
        cost_model_token_loss(*tokens[:2], *labels, tokens[2], regularization=0.0)

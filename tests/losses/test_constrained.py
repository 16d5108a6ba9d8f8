import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import (
    clipped_surrogate,
    gae,
    kl,
    kl_shaped_rewards,
    masked,
)
from rlhf_jax.losses.constrained import (
    combined_advantage,
    combined_reward,
    cost_ema,
    lagrangian_update,
)
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/losses/constrained.npz"


@pytest.fixture(scope="module")
def reference():
    """What safe-rlhf and the ES paper's trainer computed."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


# λ


def update(log_multiplier, mean_cost, **changes):
    settings = {
        "cost_limit": 0.5,
        "lr": 0.1,
        "rule": "gradient",
        "min_multiplier": 0.0,
        "max_multiplier": 5.0,
    }
    return lagrangian_update(log_multiplier, mean_cost, **(settings | changes))


def test_lagrangian_update_worked_by_hand():
    # λ = 2, two above the limit: log 2 + 0.1 · 2 · (2.5 - 0.5) = 0.6931472 + 0.4
    np.testing.assert_allclose(update(np.log(2.0), 2.5), 1.0931472, rtol=1e-6)
    # the other rule does not look at λ: 0.6931472 + 0.1 · 2
    got = update(np.log(2.0), 2.5, rule="exponential")
    np.testing.assert_allclose(got, 0.8931472, rtol=1e-6)
    # one below the limit, λ = 1/2: -0.6931472 - 0.1 · 1/2, and - 0.1
    got = [update(np.log(0.5), -0.5, rule=r) for r in ("gradient", "exponential")]
    np.testing.assert_allclose(got, [-0.7431472, -0.7931472], rtol=1e-6)
    # held at 5, log 5 = 1.6094379, and at 0.7, log 0.7 = -0.3566749
    np.testing.assert_allclose(update(1.6, 1000.0), 1.6094379, rtol=1e-6)
    got = update(0.0, -1000.0, min_multiplier=0.7)
    np.testing.assert_allclose(got, -0.3566749, rtol=1e-6)


@pytest.mark.parametrize("rule", ["gradient", "exponential"])
def test_multiplier_grows_while_the_cost_is_above_its_limit(rule):
    for log_multiplier in (-3.0, 0.0, 1.0):
        assert update(log_multiplier, 0.6, rule=rule) > log_multiplier
        assert update(log_multiplier, 0.4, rule=rule) < log_multiplier
        assert update(log_multiplier, 0.5, rule=rule) == log_multiplier


def test_gradient_rule_descends_its_loss(rng):
    """A step of plain gradient descent on -(C - d) exp(log λ), by autodiff."""
    for log_multiplier, cost in rng.normal(size=(5, 2)).astype(np.float32):
        slope = jax.grad(lambda x, c=cost: -(c - 0.5) * jnp.exp(x))(log_multiplier)
        got = update(log_multiplier, cost, max_multiplier=1e9)
        np.testing.assert_allclose(got, log_multiplier - 0.1 * slope, rtol=1e-5)


def test_lagrangian_update_equals_safe_rlhf(reference):
    settings = {
        name: float(reference[f"multiplier/{name}"])
        for name in ("lr", "cost_limit", "max_multiplier")
    }
    settings |= {"rule": "gradient", "min_multiplier": 0.0}
    step = jax.jit(functools.partial(lagrangian_update, **settings))
    log_multiplier = jnp.float32(0.0)
    for cost, expected in zip(
        reference["episode_costs"], reference["multiplier/log"], strict=True
    ):
        log_multiplier = step(log_multiplier, cost)
        np.testing.assert_allclose(log_multiplier, expected, rtol=1e-5, atol=1e-6)


def test_running_cost_multiplier_and_reward_equal_the_es_papers(reference):
    given = {
        name.removeprefix("adaptive/"): x
        for name, x in reference.items()
        if name.startswith("adaptive/")
    }
    names = ("lr", "cost_limit", "min_multiplier", "max_multiplier")
    settings = {name: float(given[name]) for name in names} | {"rule": "exponential"}
    log_multiplier, ema = jnp.log(given["initial"]), None
    for step, (rewards, costs) in enumerate(reference["scored"]):
        ema = cost_ema(ema, costs.mean(), decay=float(given["beta"]))
        log_multiplier = lagrangian_update(log_multiplier, ema, **settings)
        combined = combined_reward(rewards, costs, log_multiplier=log_multiplier)
        multiplier = jnp.exp(log_multiplier)
        np.testing.assert_allclose(ema, given["ema"][step], rtol=1e-5)
        np.testing.assert_allclose(multiplier, given["multiplier"][step], rtol=1e-5)
        np.testing.assert_allclose(
            combined, given["combined"][step], rtol=1e-5, atol=1e-6
        )


def test_a_multiplier_beyond_float32_comes_back_into_its_bounds():
    # exp(90) is inf in float32, and inf · 0 is nan; log 5 = 1.6094379
    np.testing.assert_allclose(update(90.0, 0.5), 1.6094379, rtol=1e-6)
    assert np.isfinite(update(90.0, 0.5, max_multiplier=3e38))


def test_gradient_rule_sticks_without_a_lower_bound():
    # λ = 50, a hundred below the limit: log λ = 3.9 - 0.1 · 50 · 100, and λ = 0
    low = update(np.log(50.0), -99.5, max_multiplier=100.0)
    assert update(low, 1e6) == low < -400
    assert update(low, 1e6, rule="exponential") > low


def test_lagrangian_update_is_float32_and_compiles():
    step = functools.partial(update, rule="exponential", min_multiplier=1e-4)
    invariants.assert_jit_equals_eager(step, np.float32(0.3), np.float32(2.0))
    invariants.assert_bfloat16_gives_float32(step, [np.float32(0.3), np.float32(2.0)])
    got = jax.jit(lambda limit: update(0.0, 1.0, cost_limit=limit))(jnp.float32(0.5))
    np.testing.assert_allclose(got, 0.05, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "sgd"}, "rule is 'sgd', expected one of gradient, exponential"),
        ({"lr": 0.0}, "lr is 0.0, expected"),
        ({"min_multiplier": -1.0}, "min_multiplier is -1.0, expected"),
        ({"max_multiplier": 0.0}, "max_multiplier is 0.0, expected"),
        (
            {"min_multiplier": 2.0, "max_multiplier": 1.0},
            r"max_multiplier is 1.0, expected a number in \[2.0, 3.4",
        ),
        ({"max_multiplier": float("inf")}, "max_multiplier is inf, expected"),
        (
            {"cost_limit": np.ones(3)},
            r"cost_limit has shape \(3,\), expected \(\), a s",
        ),
        ({"lr": np.ones(3)}, r"lr has shape \(3,\), expected \(\), a scalar"),
        ({"min_multiplier": np.ones(3)}, r"min_multiplier has shape \(3,\), expected"),
        ({"max_multiplier": np.ones(3)}, r"max_multiplier has shape \(3,\), expected"),
        ({"mean_cost": np.ones(3)}, r"mean_cost has shape \(3,\), expected \(\)"),
        ({"log_multiplier": np.ones(1)}, r"log_multiplier has shape \(1,\), expected"),
    ],
)
def test_lagrangian_update_with_bad_arguments_raises(change, message):
    with pytest.raises(ValueError, match=message):
        update(**({"log_multiplier": 0.0, "mean_cost": 1.0} | change))


def test_cost_ema_worked_by_hand_and_by_a_loop(rng):
    # the first is itself; then 0.9 · 4 + 0.1 · (-1) = 3.5
    assert float(cost_ema(None, 4.0, decay=0.9)) == 4.0
    np.testing.assert_allclose(cost_ema(4.0, -1.0, decay=0.9), 3.5, rtol=1e-6)
    costs = rng.normal(size=20).astype(np.float32)
    # all of it spelled out: the oldest has no (1 - β) before it
    weights = np.array([0.3 * 0.7 ** (19 - i) for i in range(20)])
    weights[0] /= 0.3
    ema = None
    for cost in costs:
        ema = cost_ema(ema, cost, decay=0.7)
    np.testing.assert_allclose(ema, weights @ costs, rtol=1e-5)
    step = functools.partial(cost_ema, decay=0.7)
    invariants.assert_jit_equals_eager(step, np.float32(1.0), np.float32(2.0))
    invariants.assert_bfloat16_gives_float32(step, [np.float32(1.3), np.float32(2.0)])
    with pytest.raises(ValueError, match=r"ema has shape \(2,\), expected \(\)"):
        step(np.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"mean_cost has shape \(2,\), expected \(\)"):
        step(None, np.ones(2))
    with pytest.raises(ValueError, match=r"decay is 1\.5, expected"):
        cost_ema(1.0, 1.0, decay=1.5)
    with pytest.raises(ValueError, match=r"decay has shape \(2,\), expected \(\)"):
        cost_ema(None, 1.0, decay=np.ones(2))


# what the policy learns


combined = functools.partial(combined_advantage, log_multiplier=np.log(1.5))


def random_advantages(rng, B=3, T=5):
    return list(rng.normal(size=(2, B, T)).astype(np.float32))


def test_combined_advantage_worked_by_hand():
    A_R = np.array([[5.0, 1.0, np.nan]], np.float32)
    A_C = np.array([[-1.0, 2.0, np.inf]], np.float32)
    mask = np.array([[True, True, False]])
    # λ = 3: (5 + 3 · 1) / 4 = 2 and (1 - 3 · 2) / 4 = -1.25
    got = combined_advantage(A_R, A_C, mask, log_multiplier=np.log(3.0))
    np.testing.assert_allclose(got, [[2.0, -1.25, 0.0]], rtol=1e-6)
    # λ = 0 is the reward's own
    got = combined_advantage(A_R, A_C, mask, log_multiplier=-np.inf)
    np.testing.assert_array_equal(got, [[5.0, 1.0, 0.0]])


def test_a_large_multiplier_leaves_the_cost_alone():
    A_R, A_C = np.array([[5.0, 1.0]]), np.array([[-1.0, 20.0]])
    mask = np.ones((1, 2), bool)
    # 20 · exp(87) is beyond float32, and so is exp(90)
    for log_multiplier in (87.0, jnp.float32(90.0), np.inf):
        got = combined_advantage(A_R, A_C, mask, log_multiplier=log_multiplier)
        np.testing.assert_allclose(got, -A_C, rtol=1e-6)
    # and a cost of zero is none, whatever it is multiplied by
    got = combined_reward(A_R, 0.0 * A_C, log_multiplier=90.0)
    np.testing.assert_array_equal(got, A_R)


def test_combined_advantage_equals_a_loop(rng):
    (A_R, A_C), mask = random_advantages(rng), invariants.random_mask(rng, 3, 5)
    expected = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        expected[i, t] = (float(A_R[i, t]) - 1.5 * float(A_C[i, t])) / 2.5
    np.testing.assert_allclose(combined(A_R, A_C, mask), expected, rtol=1e-5, atol=1e-7)


def test_combined_advantage_in_the_policy_loss_equals_safe_rlhf(reference):
    mask, clip = reference["mask"], float(reference["clip"])

    def loss(logprobs):
        advantages = combined_advantage(
            *reference["advantages"],
            mask,
            log_multiplier=reference["log_multiplier"],
        )
        losses, _ = clipped_surrogate(
            logprobs,
            reference["old_logprobs"],
            advantages,
            mask,
            clip_low=clip,
            clip_high=clip,
        )
        # their mean is one of sequences: each over its own tokens
        return masked.mean(losses, mask, axis=1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(reference["logprobs"])
    np.testing.assert_allclose(value, reference["actor/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, reference["actor/gradient"], rtol=1e-5, atol=1e-7
    )


def test_kl_shaped_costs_equal_safe_rlhf(reference):
    """A negative coefficient adds the KL to the cost."""
    mask, beta = reference["mask"], float(reference["kl_coef"])
    k1 = kl.k1(reference["logprobs"], reference["ref_logprobs"], mask)
    for i, coef in enumerate((beta, -beta)):
        got = kl_shaped_rewards(reference["scores"][i], k1, mask, kl_coef=coef)
        expected = np.where(mask, reference["shaped"][i], 0.0)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("multiplier", [0.0, 1.0, 4.0])
def test_the_kl_weighs_the_same_whatever_the_multiplier(rng, multiplier):
    drift = rng.normal(size=(3, 5)).astype(np.float32)
    mask, nothing = invariants.random_mask(rng, 3, 5), np.zeros((3, 5), np.float32)
    reward, cost = (
        gae(
            kl_shaped_rewards(np.zeros(3), drift, mask, kl_coef=coef),
            nothing,
            mask,
            gamma=1.0,
            lam=0.95,
        )[0]
        for coef in (0.1, -0.1)
    )
    with np.errstate(divide="ignore"):
        log_multiplier = np.log(multiplier)
    got = combined_advantage(reward, cost, mask, log_multiplier=log_multiplier)
    np.testing.assert_allclose(got, reward, rtol=1e-5, atol=1e-7)


def test_the_multiplier_gets_no_gradient(rng):
    (A_R, A_C), mask = random_advantages(rng), invariants.random_mask(rng, 3, 5)

    def total(log_multiplier):
        option = {"log_multiplier": log_multiplier}
        advantage = combined_advantage(A_R, A_C, mask, **option)
        reward = combined_reward(A_R, A_C, **option)
        return advantage.sum() + reward.sum()

    assert jax.grad(total)(jnp.float32(0.5)) == 0.0


def test_combined_advantage_with_bad_arguments_raises(rng):
    arrays, mask = random_advantages(rng), invariants.random_mask(rng, 3, 5)
    invariants.assert_wrong_shapes_raise(
        combined, [*arrays, mask], ["reward_advantages", "cost_advantages", "mask"]
    )
    for value, message in (
        (float("nan"), "is nan, expected a number in"),
        (None, "is None, expected a number"),
        (np.ones(3), r"has shape \(3,\), expected \(\)"),
    ):
        with pytest.raises(ValueError, match=f"log_multiplier {message}"):
            combined_advantage(*arrays, mask, log_multiplier=value)
        with pytest.raises(ValueError, match=f"log_multiplier {message}"):
            combined_reward(*arrays, log_multiplier=value)


def test_what_the_update_gives_is_what_the_others_take():
    # λ = 2 without a change, as the cost is at its limit: (5 - 2 · 1) / 3, 5 - 2 · 1
    log_multiplier = update(np.log(2.0), 0.5)
    five, one, mask = np.array([[5.0]]), np.array([[1.0]]), np.ones((1, 1), bool)
    got = combined_advantage(five, one, mask, log_multiplier=log_multiplier)
    np.testing.assert_allclose(got, [[1.0]], rtol=1e-6)
    got = combined_reward(five, one, log_multiplier=log_multiplier)
    np.testing.assert_allclose(got, [[3.0]], rtol=1e-6)


def test_combined_reward_worked_by_hand():
    rewards, costs = np.array([4, 4, -2]), np.array([1, 0, -3])
    # λ = 2: 4 - 2, 4 - 0, -2 + 6
    two = {"log_multiplier": np.log(2.0)}
    got = combined_reward(rewards, costs, **two)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [2.0, 4.0, 4.0], rtol=1e-6)
    # the first is unsafe, and keeps a quarter of its reward: 1 - 2
    got = combined_reward(rewards, costs, **two, safe_first=0.25)
    np.testing.assert_allclose(got, [-1.0, 4.0, 4.0], rtol=1e-6)
    # of R = -4 a quarter would be more: being unsafe is no way to keep -1 of it
    got = combined_reward(
        np.array([-4.0, -4.0]), np.array([1.0, 0.0]), **two, safe_first=0.25
    )
    np.testing.assert_allclose(got, [-6.0, -4.0], rtol=1e-6)


def test_combined_reward_equals_a_loop(rng):
    rewards, costs = rng.normal(size=(2, 3, 4)).astype(np.float32)
    expected = np.zeros((3, 4))
    for i, j in np.ndindex(3, 4):
        kept = 0.3 if costs[i, j] > 0 and rewards[i, j] > 0 else 1.0
        expected[i, j] = kept * float(rewards[i, j]) - 1.5 * float(costs[i, j])
    function = functools.partial(
        combined_reward, log_multiplier=np.log(1.5), safe_first=0.3
    )
    got = function(rewards, costs)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(function(rewards[::-1], costs[::-1]), got[::-1])
    invariants.assert_jit_equals_eager(function, rewards, costs)
    invariants.assert_bfloat16_gives_float32(function, [rewards, costs])
    invariants.assert_wrong_shapes_raise(
        function, [rewards, costs], ["rewards", "costs"]
    )
    with pytest.raises(ValueError, match=r"safe_first is 2\.0, expected"):
        combined_reward(rewards, costs, log_multiplier=0.0, safe_first=2.0)

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax.losses import masked
from rlhf_jax.losses.direct_preference import dpo
from rlhf_jax.losses.preference import sequence_logprobs
from rlhf_jax.losses.reference_free import cpo, log_odds_ratio, orpo, simpo
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "preference.npz"
REFERENCE = dict(np.load(FIXTURE))
CASES = json.loads(str(REFERENCE["cases"]))
KERNELS = {
    "orpo": functools.partial(orpo, beta=0.3),
    "log_odds_ratio": log_odds_ratio,
    "simpo": functools.partial(simpo, beta=2.0, gamma=0.5, label_smoothing=0.1),
    "alphapo": functools.partial(simpo, beta=0.5, gamma=0.5, alpha=0.25),
    "cpo": functools.partial(cpo, beta=0.3, nll_coef=0.7, label_smoothing=0.1),
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def random_arguments(rng, B=6):
    logprobs = -rng.exponential(1.0, (2, B)).astype(np.float32)
    return list(logprobs), np.array([1, 1, 0, 1, 0, 1], bool)


# values


def test_orpo_worked_by_hand():
    # p of ½ and ¼: odds of 1 and ⅓, so the ratio is 3, and σ(ln 3) = ¾
    chosen, rejected = np.log(np.array([[0.5, 0.25], [0.25, 0.5]], np.float32))
    ln3 = 1.0986123
    np.testing.assert_allclose(log_odds_ratio(chosen, rejected), [ln3, -ln3], rtol=1e-6)
    # ln 2 + ½ ln 4/3 = 0.6931472 + 0.1438410, and ln 4 + ½ ln 4 = 2.0794415
    got = orpo(chosen, rejected, beta=0.5)
    np.testing.assert_allclose(got, [0.8369882, 2.0794415], rtol=1e-6)


def test_simpo_worked_by_hand():
    # 2 (-1 + 1.7) - 0.4 = 1: ln(1 + e⁻¹) = 0.3132617, and ln(1 + e) = 1.3132617
    chosen, rejected = np.array([[-1.0], [-1.7]], np.float32)
    got = simpo(chosen, rejected, beta=2.0, gamma=0.4)
    np.testing.assert_allclose(got, [0.3132617], rtol=1e-6)
    got = simpo(chosen, rejected, beta=2.0, gamma=0.4, label_smoothing=0.25)
    # 0.75 · 0.3132617 + 0.25 · 1.3132617
    np.testing.assert_allclose(got, [0.5632617], rtol=1e-6)
    # α = 1: 1 - 1/p is -1 at ½ and -2 at ⅓, so z = 2 · 1 - 1
    chosen, rejected = np.log(np.array([[1 / 2], [1 / 3]], np.float32))
    got = simpo(chosen, rejected, beta=2.0, gamma=1.0, alpha=1.0)
    np.testing.assert_allclose(got, [0.3132617], rtol=1e-6)


def test_cpo_worked_by_hand():
    # ½ (-3 + 5) = 1: 0.3132617, and for the other term 3 nats, or 3 over 4 tokens
    chosen, rejected = np.array([[-3.0], [-5.0]], np.float32)
    got = cpo(chosen, rejected, beta=0.5, nll_coef=0.0)
    np.testing.assert_allclose(got, [0.3132617], rtol=1e-6)
    got = cpo(chosen, rejected, beta=0.5, nll_coef=0.1)
    np.testing.assert_allclose(got, [0.6132617], rtol=1e-6)
    got = cpo(chosen, rejected, beta=0.5, nll_coef=0.1, chosen_lengths=np.array([4]))
    np.testing.assert_allclose(got, [0.3882617], rtol=1e-6)
    # ¾ · 0.3132617 + ¼ · 1.3132617
    got = cpo(chosen, rejected, beta=0.5, nll_coef=0.0, label_smoothing=0.25)
    np.testing.assert_allclose(got, [0.5632617], rtol=1e-6)


# oracles


def sigma(x):
    return 1 / (1 + np.exp(-x))


def smoothed(z, epsilon=0.1):
    return -(1 - epsilon) * np.log(sigma(z)) - epsilon * np.log(1 - sigma(z))


def log_odds(log_p):
    return np.log(np.exp(log_p) / (1 - np.exp(log_p)))


def alpha_reward(log_p):
    return (1 - np.exp(log_p) ** -0.25) / 0.25


ORACLES = {
    "orpo": lambda won, lost: (
        -won - 0.3 * np.log(sigma(log_odds(won) - log_odds(lost)))
    ),
    "log_odds_ratio": lambda won, lost: log_odds(won) - log_odds(lost),
    "simpo": lambda won, lost: smoothed(2.0 * (won - lost) - 0.5),
    "alphapo": lambda won, lost: smoothed(
        0.5 * (alpha_reward(won) - alpha_reward(lost)) - 0.5, 0
    ),
    "cpo": lambda won, lost: smoothed(0.3 * (won - lost)) - 0.7 * won,
}


@each_kernel
def test_equals_a_loop(rng, kernel):
    arrays, mask = random_arguments(rng)

    def total(chosen, rejected):
        losses = KERNELS[kernel](chosen, rejected, mask)
        return losses.sum(), losses

    slopes, losses = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(*arrays)
    oracle = ORACLES[kernel]
    expected, expected_slopes = np.zeros(6), np.zeros((2, 6))
    for i in np.flatnonzero(mask):
        won, lost = (float(x[i]) for x in arrays)
        expected[i] = oracle(won, lost)
        expected_slopes[0, i] = (
            oracle(won + 1e-6, lost) - oracle(won - 1e-6, lost)
        ) / 2e-6
        expected_slopes[1, i] = (
            oracle(won, lost + 1e-6) - oracle(won, lost - 1e-6)
        ) / 2e-6
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name][0] in ("orpo", "simpo", "cpo")]
)
def test_equals_trl(name):
    """ORPOTrainer and CPOTrainer, gradients too: see make_preference_fixtures.py."""
    function, options = CASES[name]
    masks = REFERENCE["mask"]

    def total(logprobs):
        if function == "cpo":
            sums = [sequence_logprobs(*x)[0] for x in zip(logprobs, masks, strict=True)]
            losses = cpo(*sums, **options)
        else:
            arguments = zip(logprobs, masks, strict=True)
            means = [masked.mean(x, mask, axis=1) for x, mask in arguments]
            losses = {"orpo": orpo, "simpo": simpo}[function](*means, **options)
        return losses.mean(), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(REFERENCE["logprobs"])
    np.testing.assert_allclose(losses, REFERENCE[f"{name}/losses"], rtol=1e-5)
    np.testing.assert_allclose(losses.mean(), REFERENCE[f"{name}/loss"], rtol=1e-5)
    expected = REFERENCE[f"{name}/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


# identities


def test_cpo_is_dpo_with_a_uniform_reference(rng):
    (chosen, rejected), mask = random_arguments(rng)
    got = cpo(chosen, rejected, mask, beta=0.3, nll_coef=0.0, label_smoothing=0.1)
    constant = np.full(6, -7.0, np.float32)
    expected = dpo(
        *(chosen, rejected, constant, constant, mask),
        **{"beta": 0.3, "loss_type": "sigmoid", "label_smoothing": 0.1},
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_simpo_without_a_margin_is_cpo_on_means_and_alphapo_its_neighbour(rng):
    arrays, mask = random_arguments(rng)
    got = simpo(*arrays, mask, beta=0.3, gamma=0.0)
    expected = cpo(*arrays, mask, beta=0.3, nll_coef=0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    near = simpo(*arrays, mask, beta=0.3, gamma=0.0, alpha=1e-6)
    np.testing.assert_allclose(near, expected, rtol=1e-4)


def test_swapping_the_pair_turns_the_odds_around(rng):
    (chosen, rejected), mask = random_arguments(rng)
    got = log_odds_ratio(chosen, rejected, mask)
    np.testing.assert_array_equal(got, -log_odds_ratio(rejected, chosen, mask))
    # equal odds: log 2 on top of the likelihood
    got = orpo(chosen, chosen, mask, beta=0.5)
    expected = np.where(mask, -chosen + 0.5 * np.log(2), 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_certain_and_impossible_responses_overflow_nothing():
    # a certain one rounds to 0, or even above
    chosen = np.array([0.0, 1e-6, -1e-12, -200.0, 0.0], np.float32)
    rejected = np.array([-1.0, -1.0, -200.0, 0.0, 0.0], np.float32)
    for kernel in KERNELS.values():
        total = lambda won, lost, kernel=kernel: kernel(won, lost).sum()
        assert np.isfinite(kernel(chosen, rejected)).all()
        for slope in jax.grad(total, argnums=(0, 1))(chosen, rejected):
            assert np.isfinite(slope).all()


# bad input


@each_kernel
def test_wrong_shape_raises(rng, kernel):
    arrays, mask = random_arguments(rng)
    names = ["chosen_logprobs", "rejected_logprobs", "mask"]
    invariants.assert_wrong_shapes_raise(KERNELS[kernel], [*arrays, mask], names)
    with pytest.raises(ValueError, match=r"has shape \(6, 1\), expected \[B\]"):
        KERNELS[kernel](*(x[:, None] for x in arrays))


def test_wrong_lengths_raise(rng):
    arrays, mask = random_arguments(rng)
    with pytest.raises(ValueError, match=r"chosen_lengths has shape \(5,\), expected"):
        cpo(*arrays, mask, beta=0.3, nll_coef=1.0, chosen_lengths=np.ones(5))


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ("orpo", {"beta": -0.1}, r"beta is -0\.1, expected"),
        ("simpo", {"beta": 0.0}, r"beta is 0\.0, expected"),
        ("simpo", {"label_smoothing": 0.6}, r"label_smoothing is 0\.6, expected"),
        ("simpo", {"alpha": 0.0}, "alpha is 0, expected another number"),
        ("cpo", {"beta": 0.0}, r"beta is 0\.0, expected"),
        ("cpo", {"nll_coef": -1.0}, r"nll_coef is -1\.0, expected"),
        ("cpo", {"label_smoothing": -0.1}, r"label_smoothing is -0\.1, expected"),
    ],
)
def test_number_out_of_range_raises(rng, kernel, options, message):
    arrays, mask = random_arguments(rng)
    with pytest.raises(ValueError, match=message):
        KERNELS[kernel](*arrays, mask, **options)

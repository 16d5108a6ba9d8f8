from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlhf_jax.losses.direct_preference import dpo
from rlhf_jax.losses.dpo_types import LOSS_TYPES

NEEDS = {"exo_pair": {"label_smoothing": 0.1}, "discopop": {"tau": 0.5}}
NEEDS |= {kind: {"label_smoothing": 0.1} for kind in ("robust", "aot", "aot_unpaired")}
each_type = pytest.mark.parametrize("kind", LOSS_TYPES)


def options_of(kind):
    return {"beta": 0.3, "loss_type": kind, **NEEDS.get(kind, {})}


def with_everything(kind):
    """All arrays by position: log-probabilities, lengths, weights, mask."""

    def function(won, lost, ref_w, ref_l, n_w, n_l, weights, mask):
        weights = None if LOSS_TYPES[kind].sorts else weights
        lengths = {"chosen_lengths": n_w, "rejected_lengths": n_l}
        arrays = (won, lost, ref_w, ref_l, mask)
        return dpo(*arrays, **options_of(kind), **lengths, weights=weights)

    return function


def random_arguments(rng, B=6):
    logprobs = rng.normal(-5.0, 2.0, (4, B)).astype(np.float32)
    lengths = rng.integers(1, 9, (2, B)).astype(np.float32)
    weights = rng.random(B).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 0, 1], bool)
    return [*logprobs, *lengths, weights], mask


# values


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # s_w = ln 3 and s_l = 0 with β = 1, so z = ln 3 and σ(z) = σ(s_w) = 3/4;
        # ln 4/3 = 0.2876821, ln 4 = 1.3862944, ln 2 = 0.6931472
        ("sigmoid", 0.2876821),
        # the mean over two tokens is ln √3, and σ of it √3 / (1 + √3) = 0.6339746
        ("sigmoid_norm", 0.4557464),
        # 1 - 1.0986123 is below zero
        ("hinge", 0.0),
        # (0.5493061 - 0.5)² and (1.0986123 - 0.5)²
        ("ipo", 0.00243110),
        ("ipo_sum", 0.3583367),
        # 0.75 ln(0.75 / 0.9) + 0.25 ln(0.25 / 0.1) = -0.1367412 + 0.2290727
        ("exo_pair", 0.0923315),
        # 0.2876821 + ½ 1.3862944 + ½ 0.6931472
        ("nca_pair", 1.3274029),
        # (0.9 · 0.2876821 - 0.1 · 1.3862944) / 0.8
        ("robust", 0.1503556),
        # 0.2876821 + 0.6931472
        ("bco_pair", 0.9808293),
        # 0.5986123² + 0.5²
        ("sppo_hard", 0.6083367),
        # a batch of one sorts nothing: 0.9 · 0.2876821 + 0.1 · 1.3862944
        ("aot", 0.3975433),
        ("aot_unpaired", 0.3975433),
        # ¼ + ½ and ¾ + ¼
        ("apo_zero", 0.75),
        ("apo_down", 1.0),
        # with τ = ½, m = σ(2 ln 3) = 0.9: 0.1 · 0.2876821 + 0.9 · ⅓
        ("discopop", 0.3287682),
        # two nats over two tokens
        ("sft", 1.0),
    ],
)
def test_values_worked_by_hand(kind, expected):
    log3 = np.float32(np.log(3))
    logprobs = np.array([[-2.0], [-5.0], [-2.0 - log3], [-5.0]], np.float32)
    got = dpo(
        *logprobs,
        **(options_of(kind) | {"beta": 1.0}),
        chosen_lengths=np.array([2]),
        rejected_lengths=np.array([4]),
    )
    np.testing.assert_allclose(got, [expected], rtol=2e-6)


def test_sorted_margins_worked_by_hand():
    # margins 2, 0 (and one that is none); the reference's -1, 0.5: in order of rank
    # 0 - (-1) = 1 and 2 - 0.5 = 1.5; ln(1 + e^-1.5) = 0.2014133, and with 1 0.3132617
    won, zeros = np.array([2.0, 9.0, 0.0], np.float32), np.zeros(3, np.float32)
    ref_w, mask = np.array([-1.0, -9.0, 0.5], np.float32), np.array([1, 0, 1])
    got = dpo(won, zeros, ref_w, zeros, mask, beta=1.0, loss_type="aot")
    np.testing.assert_allclose(got, [0.2014133, 0.0, 0.3132617], rtol=1e-6)
    # unpaired: s_w = 2, 0 and s_l = -1, 0.5, the same ranks
    got = dpo(won, ref_w, zeros, zeros, mask, beta=1.0, loss_type="aot_unpaired")
    np.testing.assert_allclose(got, [0.2014133, 0.0, 0.3132617], rtol=1e-6)


# oracles


def sigma(x):
    return 1 / (1 + np.exp(-x))


def smoothed(x):
    return -0.9 * np.log(sigma(x)) - 0.1 * np.log(1 - sigma(x))


ORACLES = {
    "sigmoid": lambda p: -np.log(sigma(0.3 * (p.s_w - p.s_l))),
    "sigmoid_norm": lambda p: -np.log(sigma(0.3 * (p.s_w / p.n_w - p.s_l / p.n_l))),
    "hinge": lambda p: max(0.0, 1 - 0.3 * (p.s_w - p.s_l)),
    "ipo": lambda p: (p.s_w / p.n_w - p.s_l / p.n_l - 1 / 0.6) ** 2,
    "ipo_sum": lambda p: (p.s_w - p.s_l - 1 / 0.6) ** 2,
    "exo_pair": lambda p: sum(
        q * np.log(q / label)
        for q, label in (
            (sigma(0.3 * (p.s_w - p.s_l)), 0.9),
            (sigma(0.3 * (p.s_l - p.s_w)), 0.1),
        )
    ),
    "robust": lambda p: (
        (
            0.9 * np.log(1 + np.exp(-0.3 * (p.s_w - p.s_l)))
            - 0.1 * np.log(1 + np.exp(0.3 * (p.s_w - p.s_l)))
        )
        / 0.8
    ),
    "nca_pair": lambda p: (
        -np.log(sigma(0.3 * p.s_w))
        - np.log(1 - sigma(0.3 * p.s_w)) / 2
        - np.log(1 - sigma(0.3 * p.s_l)) / 2
    ),
    "bco_pair": lambda p: -np.log(sigma(0.3 * p.s_w) * (1 - sigma(0.3 * p.s_l))),
    "sppo_hard": lambda p: (p.s_w - 1 / 0.6) ** 2 + (p.s_l + 1 / 0.6) ** 2,
    "aot": lambda p: smoothed(0.3 * (p.won - p.lost - p.ref_margin_of_rank)),
    "aot_unpaired": lambda p: smoothed(0.3 * (p.s_w - p.s_l_of_rank)),
    "apo_zero": lambda p: 1 - sigma(0.3 * p.s_w) + sigma(0.3 * p.s_l),
    "apo_down": lambda p: sigma(0.3 * p.s_w) + 1 - sigma(0.3 * (p.s_w - p.s_l)),
    "discopop": lambda p: (
        (1 - sigma(0.6 * (p.s_w - p.s_l))) * np.log(1 + np.exp(-0.3 * (p.s_w - p.s_l)))
        + sigma(0.6 * (p.s_w - p.s_l)) * np.exp(-0.3 * (p.s_w - p.s_l))
    ),
    "sft": lambda p: -p.won / p.n_w,
}


def loop(kind, won, lost, ref_w, ref_l, n_w, n_l, mask):
    """One real pair after the other, in double precision."""
    losses, real = np.zeros(len(mask)), np.flatnonzero(mask)
    margins = [won[j] - lost[j] for j in real]
    for i in real:
        rank = sum(m < won[i] - lost[i] for m in margins)
        rank_w = sum(won[j] - ref_w[j] < won[i] - ref_w[i] for j in real)
        pair = SimpleNamespace(
            won=won[i],
            lost=lost[i],
            s_w=won[i] - ref_w[i],
            s_l=lost[i] - ref_l[i],
            n_w=n_w[i],
            n_l=n_l[i],
            ref_margin_of_rank=sorted(ref_w[j] - ref_l[j] for j in real)[rank],
            s_l_of_rank=sorted(lost[j] - ref_l[j] for j in real)[rank_w],
        )
        losses[i] = ORACLES[kind](pair)
    return losses


@each_type
def test_equals_a_loop(rng, kind):
    (*logprobs, n_w, n_l, _), mask = random_arguments(rng)

    def total(logprobs):
        losses = with_everything(kind)(*logprobs, n_w, n_l, np.ones_like(n_w), mask)
        return losses.sum(), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(np.stack(logprobs))
    precise = np.stack(logprobs).astype(np.float64)
    expected = loop(kind, *precise, n_w, n_l, mask)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    slopes = np.zeros_like(precise)
    for index in np.ndindex(*precise.shape):
        step = np.zeros_like(precise)
        step[index] = 1e-5
        above, below = (
            loop(kind, *(precise + x), n_w, n_l, mask).sum() for x in (step, -step)
        )
        slopes[index] = (above - below) / 2e-5
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_rows_that_fill_up_a_batch_move_no_rank(rng, kind):
    """With and without them: the same bits, gradients too."""
    arrays, mask = random_arguments(rng)

    def total(arrays, mask):
        losses = with_everything(kind)(*arrays, mask)
        return losses.sum(), losses

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, got), gradients = both([np.where(mask, x, np.nan) for x in arrays], mask)
    (_, expected), slopes = both([x[mask] for x in arrays], mask[mask])
    np.testing.assert_array_equal(got[mask], expected)
    for gradient, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_array_equal(gradient[mask], slope)


@each_type
def test_a_pair_far_from_the_reference_overflows_nothing(kind):
    big, zeros = np.array([1e4, -1e4], np.float32), np.zeros(2, np.float32)
    ones, mask = np.ones(2, np.float32), np.ones(2, bool)

    def total(logprobs):
        losses = with_everything(kind)(*logprobs, zeros, zeros, ones, ones, ones, mask)
        return losses.sum(), losses

    for pair in ((big, -big), (big, big), (zeros, big)):
        gradient, losses = jax.grad(total, has_aux=True)(pair)
        assert np.isfinite([losses, *gradient]).all()


def test_every_type_has_its_equation_and_its_paper():
    for kind in LOSS_TYPES.values():
        assert "ℓ = " in kind.function.__doc__
        assert "References:\n      " in kind.function.__doc__

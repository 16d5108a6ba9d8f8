import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.direct_preference import DIVERGENCES, dpo
from rlhf_jax.losses.preference import ld_logprobs, sequence_logprobs, wpo_weights
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "preference.npz"
REFERENCE = dict(np.load(FIXTURE))
CASES = json.loads(str(REFERENCE["cases"]))
PEERS = [name for name in CASES if CASES[name][0] in ("dpo", "wpo", "ld", "openrlhf")]
ARRAYS = [
    *("chosen_logprobs", "rejected_logprobs"),
    *("ref_chosen_logprobs", "ref_rejected_logprobs", "mask"),
]


def random_arguments(rng, B=6):
    logprobs = rng.normal(-5.0, 2.0, (4, B)).astype(np.float32)
    return list(logprobs), np.array([1, 1, 0, 1, 0, 1], bool)


# values


def test_smoothing_weights_and_a_pair_on_the_wrong_side_worked_by_hand():
    log3 = np.float32(np.log(3))
    won, lost = np.array([0.0, -log3]), np.array([-log3, 0.0])
    zeros = np.zeros(2, np.float32)
    call = functools.partial(dpo, won, lost, zeros, zeros, beta=1.0)
    # 0.9 · 0.2876821 + 0.1 · 1.3862944, and the two the other way round
    got = call(loss_type="sigmoid", label_smoothing=0.1)
    np.testing.assert_allclose(got, [0.3975433, 1.2764332], rtol=1e-6)
    got = call(loss_type="hinge", weights=np.array([3.0, 0.5]))
    # 1 + 1.0986123 = 2.0986123, halved
    np.testing.assert_allclose(got, [0.0, 1.0493062], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # f(ln 3) = 1 - ⅓, and ln(1 + e^-⅔) = 0.4143701
        ({"divergence": "forward_kl"}, 0.4143701),
        # f(ln 3) = ln(2 · 3 / 4) = ln 1.5, and σ(ln 1.5) = 0.6
        ({"divergence": "js"}, 0.5108256),
        # f(ln 3) = (1 - 1/√3) / ½ = 0.8452995, and ln(1 + e^-0.8452995) = 0.3572747
        ({"divergence": "alpha", "alpha": 0.5}, 0.3572747),
    ],
)
def test_divergences_worked_by_hand(options, expected):
    arrays = np.array([[np.log(3)], [0.0], [0.0], [0.0]], np.float32)
    got = dpo(*arrays, beta=1.0, loss_type="sigmoid", **options)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


# the peers


def from_tokens(logprobs, function, ld_alpha=1.0, **options):
    """Losses of the case from [2, B, T] log-probabilities, the peers' input."""
    masks = REFERENCE["mask"]
    ref_logprobs = REFERENCE["ref_logprobs"]
    sums = ld_logprobs(*logprobs, *masks, alpha=ld_alpha)
    ref_sums = ld_logprobs(*ref_logprobs, *masks, alpha=ld_alpha)
    (_, n_w), (_, n_l) = (sequence_logprobs(*x) for x in zip(logprobs, masks))
    if function == "wpo":
        arguments = zip(logprobs, masks, REFERENCE["log_sum_squares"])
        chosen, rejected = (
            wpo_weights(x, m, log_sum_squares=y) for x, m, y in arguments
        )
        options["weights"] = chosen * rejected
    lengths = {"chosen_lengths": n_w, "rejected_lengths": n_l}
    losses = dpo(*sums, *ref_sums, **options, **lengths)
    # TRL's mean of "sft" is over tokens, the others are over pairs.
    shares = n_w / n_w.sum() if options["loss_type"] == "sft" else 1 / len(n_w)
    return (losses * shares).sum(), losses


@pytest.mark.parametrize("name", PEERS)
def test_equals_trl_and_openrlhf(name):
    """The peers' own code, gradients too: see make_preference_fixtures.py."""
    function, options = CASES[name]
    total = functools.partial(from_tokens, function=function, **options)
    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(REFERENCE["logprobs"])
    mean, _ = total(REFERENCE["logprobs"])
    np.testing.assert_allclose(mean, REFERENCE[f"{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, REFERENCE[f"{name}/gradient"], rtol=1e-5, atol=1e-7
    )
    if f"{name}/losses" in REFERENCE:
        # the absolute part: a square of a difference of numbers near one
        np.testing.assert_allclose(
            losses, REFERENCE[f"{name}/losses"], rtol=1e-5, atol=1e-7
        )


# identities


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_equal_a_loop(divergence):
    """f′ by a difference quotient of f, as the divergences are defined."""
    alpha = 0.3 if divergence == "alpha" else None
    f = {
        "reverse_kl": lambda u: u * np.log(u),
        "forward_kl": lambda u: -np.log(u),
        "js": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
        "alpha": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * (0.3 - 1)),
    }[divergence]
    s = np.linspace(-3.0, 3.0, 13, dtype=np.float32)
    zeros = np.zeros_like(s)
    u = np.exp(s.astype(np.float64))
    slope = lambda u: (f(u + 1e-5) - f(u - 1e-5)) / 2e-5
    # "ipo_sum" with a large β shows f_w - f_l plainly: (f_w - f_l - 1/(2β))²
    got = dpo(
        *(s, zeros, zeros, zeros),
        **{"beta": 1e9, "loss_type": "ipo_sum", "divergence": divergence},
        alpha=alpha,
    )
    expected = [(slope(x) - slope(1.0)) ** 2 for x in u]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_policy_that_is_the_reference_loses_log_two(rng, divergence):
    won, lost = rng.normal(-50.0, 9.0, (2, 6)).astype(np.float32)
    alpha = 0.3 if divergence == "alpha" else None

    def total(won, lost, kind):
        losses = dpo(
            *(won, lost, w0, l0),
            **{"beta": 0.3, "loss_type": kind, "divergence": divergence},
            alpha=alpha,
        )
        return losses.sum(), losses

    w0, l0 = won, lost
    for kind in ("sigmoid", "robust"):
        slopes, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(won, lost, kind)
        np.testing.assert_allclose(losses, np.full(6, np.log(2)), rtol=1e-6)
        # f′′(1) = 1 for all but Jensen-Shannon, where it is ½: ∂ℓ = ∓ ½ β f′′
        half = 0.5 if divergence == "js" else 1.0
        np.testing.assert_allclose(slopes[0], np.full(6, -0.15 * half), rtol=1e-6)
        np.testing.assert_allclose(slopes[1], np.full(6, 0.15 * half), rtol=1e-6)


def test_swapping_chosen_and_rejected_mirrors_the_loss(rng):
    (won, lost, ref_w, ref_l), _ = random_arguments(rng)
    call = functools.partial(dpo, beta=0.3, loss_type="sigmoid")
    plain, swapped = call(won, lost, ref_w, ref_l), call(lost, won, ref_l, ref_w)
    # -log σ(z) + log σ(-z) = -z
    z = 0.3 * ((won - ref_w) - (lost - ref_l))
    np.testing.assert_allclose(plain - swapped, -z, rtol=1e-5, atol=1e-6)
    # a label that is wrong with probability ε is a mixture of the two orders
    smooth = call(won, lost, ref_w, ref_l, label_smoothing=0.2)
    np.testing.assert_allclose(smooth, 0.8 * plain + 0.2 * swapped, rtol=1e-5)
    # and the robust loss of such labels is, in expectation, the plain loss
    call = functools.partial(call, loss_type="robust", label_smoothing=0.2)
    expected = 0.8 * call(won, lost, ref_w, ref_l) + 0.2 * call(lost, won, ref_l, ref_w)
    np.testing.assert_allclose(expected, plain, rtol=1e-5, atol=1e-6)


def test_loss_types_that_fall_together(rng):
    arrays, mask = random_arguments(rng)
    ones = {"chosen_lengths": np.ones(6), "rejected_lengths": np.ones(6)}
    call = functools.partial(dpo, *arrays, mask, beta=0.3)
    plain = call(loss_type="sigmoid")
    np.testing.assert_array_equal(call(loss_type="robust"), plain)
    np.testing.assert_allclose(
        call(loss_type="sigmoid_norm", **ones), plain, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        call(loss_type="ipo", **ones), call(loss_type="ipo_sum"), rtol=1e-6
    )
    # alone, a pair has its own rank
    for i in np.flatnonzero(mask):
        row = [x[[i]] for x in arrays]
        for kind in ("aot", "aot_unpaired"):
            got = dpo(*row, beta=0.3, loss_type=kind)
            np.testing.assert_allclose(got, plain[i : i + 1], rtol=1e-5)
    # the α-divergence lies between the two Kullback-Leiblers
    call = functools.partial(call, loss_type="sigmoid")
    np.testing.assert_allclose(
        call(divergence="alpha", alpha=1e-6), plain, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(
        call(divergence="alpha", alpha=1.0), call(divergence="forward_kl")
    )


def test_a_rare_response_overflows_no_divergence():
    s, zeros = np.array([-1e4, 1e4], np.float32), np.zeros(2, np.float32)
    for divergence in DIVERGENCES:
        alpha = 1.0 if divergence == "alpha" else None
        options = {"divergence": divergence, "alpha": alpha, "loss_type": "sigmoid"}
        call = functools.partial(dpo, beta=0.1, **options)
        total = lambda s, call=call: call(s, zeros, zeros, zeros).sum()
        assert np.isfinite([total(s), *jax.grad(total)(s)]).all()


def test_numbers_may_be_traced(rng):
    (*logprobs,), mask = random_arguments(rng)

    @jax.jit
    def traced(beta, epsilon):
        return dpo(
            *logprobs, mask, beta=beta, loss_type="sigmoid", label_smoothing=epsilon
        )

    expected = dpo(*logprobs, mask, beta=0.3, loss_type="sigmoid", label_smoothing=0.1)
    got = traced(jnp.float32(0.3), jnp.float32(0.1))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_without_a_mask_all_pairs_are_real(rng):
    arrays, _ = random_arguments(rng)
    call = functools.partial(dpo, *arrays, beta=0.3, loss_type="hinge")
    np.testing.assert_array_equal(call(), call(np.ones(6, bool)))
    assert not np.asarray(call(np.zeros(6, bool))).any()


# bad input


def test_wrong_shape_raises(rng):
    arrays, mask = random_arguments(rng)
    call = functools.partial(dpo, beta=0.3, loss_type="sigmoid")
    invariants.assert_wrong_shapes_raise(call, [*arrays, mask], ARRAYS)
    for name in ("chosen_lengths", "rejected_lengths", "weights"):
        with pytest.raises(
            ValueError, match=rf"{name} has shape \(5,\), expected \(6,"
        ):
            call(*arrays, mask, **{name: mask[:5]})
    columns = [x[:, None] for x in arrays]
    with pytest.raises(ValueError, match=r"has shape \(6, 1\), expected \[B\]"):
        call(*columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmiod"}, "loss_type is 'sigmiod', expected one of sigmoid, "),
        ({"divergence": "kl"}, "divergence is 'kl', expected one of reverse_kl, "),
        ({"beta": 0.0}, r"beta is 0\.0, expected"),
        ({"label_smoothing": 0.6}, r"label_smoothing is 0\.6, expected"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            r"label_smoothing is 0\.1, expected 0 with loss_type 'hinge'",
        ),
        (
            {"loss_type": "exo_pair"},
            r"label_smoothing is 0\.0, expected a number above",
        ),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            r"label_smoothing is 0\.5, expected a number below",
        ),
        (
            {"loss_type": "nca_pair", "divergence": "js"},
            "divergence is 'js', expected 'reverse_kl' with loss_type 'nca_pair'",
        ),
        ({"divergence": "alpha"}, "alpha is None, expected a number with divergence"),
        ({"alpha": 0.5}, r"alpha is 0\.5, expected None with divergence 'reverse_kl'"),
        ({"divergence": "alpha", "alpha": 1.5}, r"alpha is 1\.5, expected a number in"),
        ({"loss_type": "discopop"}, "tau is None, expected a number with loss_type"),
        ({"tau": 0.05}, r"tau is 0\.05, expected None with loss_type 'sigmoid'"),
        ({"loss_type": "discopop", "tau": -1.0}, r"tau is -1\.0, expected a number in"),
        ({"loss_type": "ipo"}, "chosen_lengths is None, expected an array with"),
        ({"loss_type": "sft"}, "chosen_lengths is None, expected an array with"),
        (
            {"loss_type": "aot", "weights": np.ones(6)},
            "weights is given, expected None with loss_type 'aot'",
        ),
    ],
)
def test_an_option_that_does_not_fit_raises(rng, options, message):
    arrays, mask = random_arguments(rng)
    with pytest.raises(ValueError, match=message):
        dpo(*arrays, mask, **({"beta": 0.3, "loss_type": "sigmoid"} | options))

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.direct_preference import dpo
from rlhf_jax.losses.preference import sequence_logprobs
from rlhf_jax.losses.unpaired import apo_zero_unpaired, kto, kto_reference_point
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "preference.npz"
REFERENCE = dict(np.load(FIXTURE))
CASES = json.loads(str(REFERENCE["cases"]))
OPTIONS = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
LABELS = np.array([1, 0, 1, 0, 0, 1], bool)


def random_arguments(rng, B=6):
    arrays = rng.normal(-5.0, 2.0, (2, B)).astype(np.float32)
    return list(arrays), np.array([1, 1, 0, 1, 1, 1], bool)


def test_kto_worked_by_hand():
    # β = 1, z₀ = 1: s = 1 + ln 3 for a good and a bad response, σ(ln 3) = ¾
    s = np.full(2, 1.0 + np.log(3), np.float32)
    zeros, labels = np.zeros(2, np.float32), np.array([True, False])
    call = functools.partial(kto, s, zeros, labels)
    options = {"beta": 1.0, "desirable_weight": 1.0, "undesirable_weight": 2.0}
    # 1 - ¾, and 2 (1 - ¼)
    np.testing.assert_allclose(call(1.0, **options), [0.25, 1.5], rtol=1e-6)
    # without a reference point, and s = ln 3
    got = apo_zero_unpaired(s - 1.0, zeros, labels, **options)
    np.testing.assert_allclose(got, [0.25, 1.5], rtol=1e-6)


def test_reference_point_worked_by_hand():
    # (2 - 1 + 5) / 3 = 2 with the nan left out, (2 - 5) / 2 is below zero
    s = np.array([2.0, -1.0, np.nan, 5.0, -5.0], np.float32)
    zeros = np.zeros(5, np.float32)
    mask = np.array([1, 1, 0, 1, 0], bool)
    assert float(kto_reference_point(s, zeros, mask)) == 2.0
    assert float(kto_reference_point(zeros, s, mask)) == 0.0
    assert float(kto_reference_point(s, zeros, np.array([1, 0, 0, 0, 1]))) == 0.0
    assert float(kto_reference_point(s, zeros, np.zeros(5, bool))) == 0.0


def test_kto_equals_a_loop(rng):
    (logprobs, ref_logprobs), mask = random_arguments(rng)
    kl = 0.8

    def total(logprobs):
        losses = kto(logprobs, ref_logprobs, LABELS, kl, mask, **OPTIONS)
        return losses.sum(), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logprobs)
    expected, slopes = np.zeros(6), np.zeros(6)
    for i in np.flatnonzero(mask):
        s = float(logprobs[i]) - float(ref_logprobs[i])
        if LABELS[i]:
            value = 1 / (1 + np.exp(-0.3 * (s - kl)))
            expected[i] = 1.5 * (1 - value)
            slopes[i] = -1.5 * 0.3 * value * (1 - value)
        else:
            value = 1 / (1 + np.exp(-0.3 * (kl - s)))
            expected[i] = 0.7 * (1 - value)
            slopes[i] = 0.7 * 0.3 * value * (1 - value)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_equals_trl(name):
    """KTOTrainer, gradients too: see make_preference_fixtures.py."""
    _, options = CASES[name]

    def flat(key):
        return REFERENCE[key].reshape(-1, REFERENCE[key].shape[-1])

    def total(logprobs):
        mask = flat("mask")
        s, _ = sequence_logprobs(logprobs.reshape(mask.shape), mask)
        ref, _ = sequence_logprobs(flat("ref_logprobs"), mask)
        labels = REFERENCE["labels"].reshape(-1)
        if name == "apo_zero_unpaired":
            return apo_zero_unpaired(s, ref, labels, **options).mean()
        all_real = np.ones_like(mask)
        mismatched, _ = sequence_logprobs(flat("kl_logprobs"), all_real)
        ref_mismatched, _ = sequence_logprobs(flat("kl_ref_logprobs"), all_real)
        kl = kto_reference_point(mismatched, ref_mismatched)
        assert isinstance(kl, jax.core.Tracer) or kl > 0.1
        return kto(s, ref, labels, kl, **options).mean()

    got, gradient = jax.jit(jax.value_and_grad(total))(REFERENCE["logprobs"])
    np.testing.assert_allclose(got, REFERENCE[f"{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(total(REFERENCE["logprobs"]), got, rtol=1e-6)
    expected = REFERENCE[f"{name}/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_policy_that_is_the_reference_is_worth_half(rng):
    (logprobs, _), mask = random_arguments(rng)
    got = kto(logprobs, logprobs, LABELS, 0.0, mask, **OPTIONS)
    expected = np.where(mask, np.where(LABELS, 0.75, 0.35), 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_relabelling_mirrors_the_loss(rng):
    (logprobs, ref_logprobs), mask = random_arguments(rng)
    options = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    good = kto(logprobs, ref_logprobs, LABELS, 0.4, mask, **options)
    bad = kto(logprobs, ref_logprobs, ~LABELS, 0.4, mask, **options)
    np.testing.assert_allclose(good + bad, mask.astype(float), rtol=1e-6)


def test_apo_zero_of_a_pair_is_that_of_its_two_responses(rng):
    (chosen, ref_chosen), mask = random_arguments(rng)
    rejected, ref_rejected = chosen[::-1] - 0.3, ref_chosen[::-1] + 0.1
    options = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    good = apo_zero_unpaired(chosen, ref_chosen, np.ones(6, bool), mask, **options)
    bad = apo_zero_unpaired(rejected, ref_rejected, np.zeros(6, bool), mask, **options)
    expected = dpo(
        *(chosen, rejected, ref_chosen, ref_rejected, mask),
        **{"beta": 0.3, "loss_type": "apo_zero"},
    )
    np.testing.assert_allclose(good + bad, expected, rtol=1e-6)


def test_reference_point_carries_no_gradient(rng):
    (logprobs, ref_logprobs), mask = random_arguments(rng)

    def total(mismatched):
        kl = kto_reference_point(mismatched + 9.0, ref_logprobs, mask)
        return kl + kto(logprobs, ref_logprobs, LABELS, kl, mask, **OPTIONS).sum()

    assert not np.asarray(jax.grad(total)(logprobs)).any()
    # nor does a reference point that is given
    slope = jax.grad(
        lambda kl: kto(logprobs, ref_logprobs, LABELS, kl, mask, **OPTIONS).sum()
    )(jnp.float32(0.3))
    assert float(slope) == 0.0


def test_masked_labels_are_irrelevant(rng):
    arrays, mask = random_arguments(rng)
    function = functools.partial(kto, kl=0.4, **OPTIONS)
    got = function(*arrays, np.where(mask, LABELS, ~LABELS), mask=mask)
    np.testing.assert_array_equal(got, function(*arrays, LABELS, mask=mask))


def test_wrong_shape_raises(rng):
    arrays, mask = random_arguments(rng)
    invariants.assert_wrong_shapes_raise(
        lambda x, y, labels, mask: kto(x, y, labels, 0.4, mask, **OPTIONS),
        [*arrays, LABELS, mask],
        ["logprobs", "ref_logprobs", "desirable", "mask"],
    )
    invariants.assert_wrong_shapes_raise(
        kto_reference_point, [*arrays, mask], ["logprobs", "ref_logprobs", "mask"]
    )
    with pytest.raises(ValueError, match=r"kl has shape \(6,\), expected \(\)"):
        kto(*arrays, LABELS, np.zeros(6), **OPTIONS)
    with pytest.raises(ValueError, match=r"has shape \(6, 1\), expected \[B\]"):
        kto(*(x[:, None] for x in arrays), LABELS[:, None], 0.0, **OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", 0.0), ("desirable_weight", -1.0), ("undesirable_weight", -0.5)],
)
def test_number_out_of_range_raises(rng, name, value):
    arrays, mask = random_arguments(rng)
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        kto(*arrays, LABELS, 0.0, mask, **(OPTIONS | {name: value}))


@pytest.mark.parametrize("function", [kto, apo_zero_unpaired])
def test_labels_that_are_not_bool_raise(rng, function):
    """±1 would both be good ones."""
    arrays, _ = random_arguments(rng)
    z_0 = (0.4,) if function is kto else ()
    for labels in (np.where(LABELS, 1, -1), LABELS.astype(np.float32)):
        with pytest.raises(ValueError, match=r"desirable is .*32, expected bool"):
            function(*arrays, labels, *z_0, **OPTIONS)

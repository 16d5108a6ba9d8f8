import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax.losses import aggregation
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "policy.npz"
FUNCTIONS = {
    "token_mean": aggregation.token_mean,
    "sequence_mean": aggregation.sequence_mean,
    "sequence_sum": aggregation.sequence_sum,
    "constant_norm": functools.partial(aggregation.constant_norm, max_length=12),
}
each_mode = pytest.mark.parametrize("mode", FUNCTIONS)


def random_arguments(rng, B=5, T=6):
    loss = rng.normal(size=(B, T)).astype(np.float32)
    return loss, invariants.random_mask(rng, B, T)


def test_worked_by_hand():
    # three tokens, one token, and a row of nothing
    loss = np.array([[1.0, 2.0, 6.0], [5.0, np.nan, np.inf], [7.0, 7.0, 7.0]])
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    expected = {
        # 1 + 2 + 6 + 5 = 14 over four tokens
        "token_mean": (14.0, 4.0),
        # (1 + 2 + 6)/3 + 5/1 = 8 over two responses
        "sequence_mean": (8.0, 2.0),
        "sequence_sum": (14.0, 2.0),
        # two responses of at most twelve tokens
        "constant_norm": (14.0, 24.0),
    }
    assert tuple(expected) == aggregation.MODES == tuple(FUNCTIONS)
    for mode, pair in expected.items():
        for got in (
            FUNCTIONS[mode](loss, mask),
            aggregation.aggregate(loss, mask, mode=mode, max_length=12),
        ):
            np.testing.assert_allclose(got, pair, rtol=1e-6, err_msg=mode)


@each_mode
def test_equals_a_loop(rng, mode):
    loss, mask = random_arguments(rng, B=9)
    total, count, slopes = 0.0, 0.0, np.zeros(mask.shape)
    for i in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[i, t]]
        if not real:
            continue
        weight = 1 / len(real) if mode == "sequence_mean" else 1.0
        total += weight * sum(float(loss[i, t]) for t in real)
        slopes[i, real] = weight
        count += {"token_mean": len(real), "constant_norm": 12}.get(mode, 1)
    function = FUNCTIONS[mode]
    got, gradient = jax.jit(jax.value_and_grad(function, has_aux=True))(loss, mask)
    np.testing.assert_allclose(got, (total, count), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6)


@each_mode
def test_equals_verl(mode):
    fixture = np.load(FIXTURE)
    settings = json.loads(str(fixture["settings"]))
    loss, mask = fixture["advantages"], fixture["mask"]
    assert settings["max_length"] == 12
    assert not mask[-1].any()  # a row of nothing, which verl leaves out as well

    def mean(loss):
        total, count = FUNCTIONS[mode](loss, mask)
        # verl's constant is L alone, without the number of responses
        return total / (12.0 if mode == "constant_norm" else count)

    value, gradient = jax.value_and_grad(mean)(loss)
    expected = f"verl/aggregate/{mode}"
    np.testing.assert_allclose(value, fixture[f"{expected}/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, fixture[f"{expected}/gradient"], rtol=1e-5)


@each_mode
def test_a_row_of_nothing_is_not_counted(rng, mode):
    loss, mask = random_arguments(rng)
    more = np.concatenate([loss, np.full((2, 6), np.nan, np.float32)])
    wider = np.concatenate([mask, np.zeros((2, 6), bool)])
    function = jax.jit(FUNCTIONS[mode])
    np.testing.assert_array_equal(function(more, wider), function(loss, mask))
    nothing = function(more[-2:], wider[-2:])
    np.testing.assert_array_equal(nothing, (0.0, 0.0))


@each_mode
def test_more_padding_changes_nothing(rng, mode):
    loss, mask = random_arguments(rng)
    padded = np.pad(loss, ((0, 0), (2, 3)), constant_values=np.nan)
    np.testing.assert_allclose(
        FUNCTIONS[mode](padded, np.pad(mask, ((0, 0), (2, 3)))),
        FUNCTIONS[mode](loss, mask),
        rtol=1e-6,
    )


def test_equal_lengths_make_all_means_the_same(rng):
    loss, mask = rng.normal(size=(4, 12)).astype(np.float32), np.ones((4, 12), bool)
    means = {k: f(loss, mask)[0] / f(loss, mask)[1] for k, f in FUNCTIONS.items()}
    for mode in ("sequence_mean", "constant_norm"):
        np.testing.assert_allclose(means[mode], means["token_mean"], rtol=1e-5)
    np.testing.assert_allclose(
        means["sequence_sum"], 12 * means["token_mean"], rtol=1e-5
    )


@each_mode
def test_wrong_shape_raises(rng, mode):
    loss, mask = random_arguments(rng)
    invariants.assert_wrong_shapes_raise(
        FUNCTIONS[mode], [loss, mask], ["loss", "mask"]
    )
    with pytest.raises(ValueError, match=r"loss has shape \(6,\), expected \[B, T\]"):
        FUNCTIONS[mode](loss[0], mask[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, "mode is 'mean', expected one of token_mean, sequence_mean"),
        ({"mode": "constant_norm"}, "max_length is None, expected a number"),
        ({"mode": "constant_norm", "max_length": 0}, "max_length is 0, expected"),
    ],
)
def test_bad_arguments_raise(rng, arguments, message):
    with pytest.raises(ValueError, match=message):
        aggregation.aggregate(*random_arguments(rng), **arguments)

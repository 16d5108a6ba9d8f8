"""Order, accumulation, early stop and metrics of the steps, on a loss of one number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rlhf_jax import keys, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.trainers.minibatches import (
    Minibatches,
    check_minibatches,
    make_learn,
    minibatch_order,
    summarize_steps,
)

from .one_phase import single_mesh

TARGETS = np.array([1.0, 2.0, 3.0, 6.0], np.float32)


def test_each_epoch_is_a_permutation_and_no_two_are_alike():
    key = keys.branch_key(0, keys.ORDER, 1)
    order = np.asarray(minibatch_order(key, 32, 3, 4))
    assert order.shape == (3, 4, 8)
    for epoch in order:
        assert sorted(epoch.ravel()) == list(range(32))
    assert not np.array_equal(order[0], order[1])


def learn(order, *, accumulation=1, target_kl=0.0, start=0.0, frozen=0.0):
    """Half the mean squared distance x − target, by SGD with a rate of 0.5.

    The KL of a step is, for these tests, |x|, and a frozen number is added to x.
    """

    def loss(x, rows, count, frozen):
        x = x + frozen
        part = jnp.square(x - rows).sum() / (2 * count)
        sums = {
            "loss": part,
            "policy/approx_kl": jnp.abs(x) * len(rows) / count,
            "policy/clip_fraction": jnp.float32(0),
        }
        return part, (sums, {"policy/ratio_deviation": rows.max()})

    run = make_learn(
        loss,
        optax.sgd(0.5),
        ConfigDict({"accumulation": accumulation, "target_kl": target_kl}),
        counts=lambda rows: jnp.float32(len(rows)),
        norms=lambda grads: {"policy/grad_norm": jnp.abs(grads)},
    )
    x = jnp.float32(start)
    given = (
        optax.sgd(0.5).init(x),
        TARGETS,
        Minibatches(jnp.array(order)),
        jnp.float32(frozen),
    )
    x, _, metrics = jax.jit(run)(x, *given)
    return float(x), {name: float(value) for name, value in metrics.items()}


def test_two_epochs_of_two_minibatches():
    """Minibatches {1, 2}, {3, 6}, {1, 6}, {2, 3}; x goes half the way to each mean.

    0 → 0.75 → (0.75 + 4.5)/2 = 2.625 → (2.625 + 3.5)/2 = 3.0625 → 2.78125
    """
    x, metrics = learn([[[0, 1], [2, 3]], [[0, 3], [1, 2]]])
    assert x == 2.78125
    assert metrics["optimizer/steps"] == 4
    # |x − mean| before each step: 1.5, 3.75, 0.875, 0.5625
    assert metrics["policy/grad_norm"] == (1.5 + 3.75 + 0.875 + 0.5625) / 4
    # the largest row of each minibatch
    assert metrics["first_step/ratio_deviation"] == 2
    assert metrics["policy/ratio_deviation"] == (2 + 6 + 6 + 3) / 4
    assert metrics["first_step/approx_kl"] == 0


def test_micro_batches_add_up():
    order = [[[0, 1, 2, 3]], [[3, 1, 0, 2]]]
    want = learn(order)
    for accumulation in (2, 4):
        x, metrics = learn(order, accumulation=accumulation)
        assert x == pytest.approx(want[0], rel=1e-6)
        assert metrics == pytest.approx(want[1], rel=1e-6)


def test_past_the_target_nothing_changes():
    """|x| before the steps is 0, 0.75, 2.625: from the third on none is taken."""
    order = [[[0, 1], [2, 3]], [[0, 3], [1, 2]]]
    x, metrics = learn(order, target_kl=1.0)
    assert x == 2.625
    assert metrics["optimizer/steps"] == 2
    assert metrics["policy/grad_norm"] == (1.5 + 3.75) / 2
    x, metrics = learn(order, target_kl=1.0, start=2.0)
    assert (x, metrics["optimizer/steps"]) == (2.0, 0)


def test_what_is_frozen_is_seen_and_not_moved():
    """x + 1 goes the way that x goes without."""
    order = [[[0, 1], [2, 3]], [[0, 3], [1, 2]]]
    x, metrics = learn(order, start=-1.0, frozen=1.0)
    assert (x, metrics) == (2.78125 - 1, learn(order)[1])


def test_metrics_are_means_over_the_steps_that_were_taken():
    steps = {
        "loss": jnp.array([1.0, 3.0, jnp.nan]),
        "policy/approx_kl": jnp.array([0.1, 0.3, 9.0]),
        "policy/clip_fraction": jnp.array([0.0, 0.5, 1.0]),
        "policy/ratio_deviation": jnp.array([0.25, 1.0, 2.0]),
        "taken": jnp.array([True, True, False]),
    }
    got = {name: float(value) for name, value in summarize_steps(steps).items()}
    assert got == pytest.approx(
        {
            "loss": 2.0,
            "policy/approx_kl": 0.2,
            "policy/clip_fraction": 0.25,
            "policy/ratio_deviation": 0.625,
            "first_step/approx_kl": 0.1,
            "first_step/clip_fraction": 0.0,
            "first_step/ratio_deviation": 0.25,
            "optimizer/steps": 2,
        }
    )


def sections(prompts, minibatches, accumulation, **group):
    config = ConfigDict({"rollout": {"prompts": prompts} | group})
    return config, ConfigDict(
        {"minibatches": minibatches, "accumulation": accumulation}
    )


def test_rows_that_divide():
    check_minibatches(*sections(12, 3, 2), single_mesh())
    # three prompts are no multiple of four, their responses are
    check_minibatches(*sections(3, 4, 1, group=4), single_mesh())
    check_minibatches(*sections(8, 2, 2, group=4), sharding.make_mesh(data=8))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((12, 5, 1), "config.rollout.prompts=12 must be a multiple of minibatches=5 x"),
        ((12, 2, 4), "minibatches=2 x accumulation=4"),
        ((12, 0, 1), "minibatches=0"),
        ((12, -3, -2), "minibatches=-3 x accumulation=-2"),
    ],
)
def test_rows_that_do_not_divide(given, told):
    with pytest.raises(UserError, match=told):
        check_minibatches(*sections(*given), single_mesh())


def test_rows_that_do_not_divide_over_the_mesh():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    with pytest.raises(UserError, match="prompts=12 does not divide over the 8 rows"):
        check_minibatches(*sections(12, 1, 1), mesh)
    told = r"prompts=8 x group=2 / \(minibatches x accumulation\)=4 does not divide"
    with pytest.raises(UserError, match=told):
        check_minibatches(*sections(8, 2, 2, group=2), mesh)

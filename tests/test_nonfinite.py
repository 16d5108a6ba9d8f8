"""Steps that are left out, the name of what went bad first, and what is done then."""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import nonfinite, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.loading import init_optimizer
from rlhf_jax.nonfinite import BadPhaseError, Counts, Guarded, Judge, first_tensor

PARAMS = {
    "embed": {"tokens": jnp.ones((4, 3))},
    "final_norm": {"scale": jnp.ones(3)},
    "layers": {
        "attention": {"key": {"kernel": jnp.ones((2, 3, 3))}},
        "attention_norm": {"scale": jnp.ones((2, 3))},
        "mlp": {"up": {"kernel": jnp.ones((2, 3, 5))}},
    },
}
NAMES = [
    "embed/tokens",
    "final_norm/scale",
    "layers/attention/key/kernel",
    "layers/attention_norm/scale",
    "layers/mlp/up/kernel",
]


def gradients(seed, bad=(), value=np.nan):
    """Random ones; of the weights with these names one entry is not finite."""
    rng = np.random.default_rng(seed)
    leaves, shape = jax.tree.flatten(PARAMS)
    made = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    for name in bad:
        made[NAMES.index(name)].flat[-1] = value
    return shape.unflatten(made)


def train(optimizer, grads):
    step = jax.jit(optimizer.update)
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in grads:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_bad_step_is_as_if_it_had_not_been(value):
    """1e30 is finite, and its square, of which the norm is made, is not."""
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    bad = gradients(5, ["final_norm/scale"], value)
    steps = [gradients(0), bad, gradients(1), bad, bad]
    params, state = train(nonfinite.guard(adam), steps)
    want = train(adam, [gradients(0), gradients(1)])
    jax.tree.map(np.testing.assert_array_equal, (params, state.inner), want)
    assert (int(state.skipped), int(state.in_row)) == (3, 2)


@pytest.mark.parametrize(
    ("bad", "first"),
    [
        (["final_norm/scale", "layers/mlp/up/kernel"], "layers/mlp/up/kernel"),
        (
            ["layers/attention/key/kernel", "layers/attention_norm/scale"],
            "layers/attention_norm/scale",
        ),
        (["final_norm/scale"], "final_norm/scale"),
        (NAMES, "embed/tokens"),
    ],
)
def test_the_first_weight_is_that_of_the_forward_pass(bad, first):
    optimizer = nonfinite.guard(optax.sgd(0.1))
    # What comes later in the same row of bad steps does not count.
    _, state = train(optimizer, [gradients(0), gradients(1, bad), gradients(2, NAMES)])
    run = types.SimpleNamespace(policy=PARAMS, opt_state=state)
    assert nonfinite.weight_names(run) == NAMES
    assert NAMES[int(nonfinite.counts_of(run).first)] == first


class Networks(NamedTuple):
    """As PPO's, of which the critic comes second."""

    policy: Any
    critic: Any


def test_a_network_is_whole_before_the_next():
    both = Networks(PARAMS, {"embed": {"tokens": jnp.ones(2)}})
    run = types.SimpleNamespace(**both._asdict(), opt_state=None)
    names = nonfinite.weight_names(run)
    assert names == [f"policy {name}" for name in NAMES] + ["critic embed/tokens"]
    ordered = [names[number] for number in nonfinite.forward_order(both)]
    assert ordered[-2:] == ["policy final_norm/scale", "critic embed/tokens"]
    assert nonfinite.counts_of(run) is None


def test_the_counts_outlive_the_donated_state():
    optimizer = nonfinite.guard(optax.sgd(0.1))
    state = types.SimpleNamespace(policy=PARAMS, opt_state=optimizer.init(PARAMS))
    counts = nonfinite.counts_of(state)
    for leaf in state.opt_state[1:]:
        leaf.delete()
    assert [int(count) for count in counts] == [0, 0, 0]


def test_on_a_mesh():
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    params = {"embed": {"tokens": jnp.ones((16, 8))}}
    params = jax.device_put(params, sharding.param_shardings(params, mesh))
    optimizer = nonfinite.guard(optax.adam(0.1))
    state = init_optimizer(optimizer, params, mesh)
    assert isinstance(state, Guarded)
    moments = state.inner[0].mu["embed"]["tokens"]
    assert moments.sharding == params["embed"]["tokens"].sharding
    grads = {"embed": {"tokens": jnp.ones((16, 8)).at[15, 7].set(jnp.nan)}}
    with jax.set_mesh(mesh):
        _, state = jax.jit(optimizer.update)(grads, state, params)
    assert int(state.skipped) == 1


@pytest.mark.parametrize(
    ("bad", "weight", "want"),
    [
        ([], None, None),
        (["reward/with_kl", "reward/mean", "loss"], "w", "a reward (reward/mean)"),
        (["reward/with_kl", "kl/token", "loss"], "w", "a log-probability (kl/token)"),
        (["policy/loss", "reward/with_kl"], "w", "an advantage (reward/with_kl)"),
        (["policy/grad_norm", "value/loss"], "w", "the loss (value/loss)"),
        (["logps/chosen", "loss", "grad_norm"], "w", "a log-probability (logps/ch"),
        (["loss", "grad_norm"], "w", "the loss (loss)"),
        (["policy/grad_norm", "heldout/kl"], "layers/x", "the gradient of layers/x"),
        (["heldout/kl"], None, "heldout/kl"),
    ],
)
def test_what_was_computed_first_is_named(bad, weight, want):
    good = dict.fromkeys(("reward/mean", "kl/token", "loss", "heldout/kl"), 1.0)
    found = first_tensor(good | dict.fromkeys(bad, float("nan")), weight)
    assert found == want or found.startswith(want)


def judge(action, left_out=(), said=None):
    state = types.SimpleNamespace(policy=PARAMS)
    say = (said if said is not None else []).append
    return Judge(action, say, state, left_out)


NAN = {"reward/mean": 1.0, "policy/grad_norm": float("nan")}


def test_stop():
    assert judge("stop").see(1, {"loss": 1.0}, Counts(0, 0, 0)) == {"loss": 1.0}
    with pytest.raises(
        UserError, match=r"phase 2: the gradient of final_norm/scale is"
    ):
        judge("stop").see(2, NAN, Counts(1, 1, 1))


def test_skip_counts_says_and_leaves_numbers_out():
    said = []
    found = judge("skip", said=said)
    assert found.see(1, {"loss": 1.0}, Counts(0, 0, 0))["optimizer/skipped"] == 0
    row = found.see(2, NAN, Counts(3, 3, 1))
    assert row == {"reward/mean": 1.0, "optimizer/skipped": 3}
    assert said == [
        "phase 2: the gradient of final_norm/scale is not finite; optimizer steps left "
        "out: 3"
    ]
    assert found.see(3, {"loss": 1.0}, Counts(5, 0, 1))["optimizer/skipped"] == 2
    with pytest.raises(UserError, match="10 optimizer steps in a row, so training"):
        found.see(4, NAN, Counts(13, nonfinite.PATIENCE, 1))


def test_rollback_leaves_few_phases_out():
    with pytest.raises(BadPhaseError, match="phase 5: the gradient of") as bad:
        judge("rollback", (2, 3)).see(5, NAN, Counts(1, 1, 1))
    assert bad.value.phase == 5
    with pytest.raises(UserError, match="3 phases are left out already"):
        judge("rollback", (2, 3, 4)).see(5, NAN, Counts(1, 1, 1))
    # What is bad although the phase was left out, or before any, stays bad.
    for phase in (0, 2):
        with pytest.raises(UserError, match=f"phase {phase}: heldout/kl is not finite"):
            judge("rollback", (2,)).see(phase, {"heldout/kl": np.inf}, Counts(0, 0, 0))


def test_an_unknown_action():
    with pytest.raises(UserError, match=r"config\.nonfinite='ignore' is unknown"):
        judge("ignore")

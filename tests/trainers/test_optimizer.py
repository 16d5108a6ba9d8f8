import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.loading import init_optimizer
from rlhf_jax.trainers.optimizer import (
    learning_rate,
    make_optimizer,
    make_schedule,
    scale_by_adam_tf,
    scale_by_name,
)


def make_config(**changes):
    config = {
        "name": "adam",
        "lr_scales": (),
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-5,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "schedule": "linear",
        "warmup_steps": 0,
    }
    return ConfigDict(config | changes)


def random_tree(rng):
    return {
        "layers": {
            "attention_norm": {"scale": rng.normal(size=(2, 3))},
            "attention": {"query": {"kernel": rng.normal(size=(2, 3, 4))}},
            "mlp": {"up": {"bias": rng.normal(size=(2, 4))}},
        },
        "embed": {"tokens": rng.normal(size=(5, 3))},
    }


def as_float32(tree):
    return jax.tree.map(jnp.float32, tree)


def test_adam_tf_by_hand():
    """t = 1: m = 0.1 g, v = 0.05 g², √0.05/0.1 · 0.1 g / (√0.05 |g| + ε).

    With g = 2 and ε = 0.5: √0.05 · 2 / (√0.05 · 2 + 0.5) = 0.447214/0.947214.
    """
    adam = scale_by_adam_tf(0.9, 0.95, 0.5)
    update, state = adam.update(jnp.float32([2.0]), adam.init(jnp.zeros(1)))
    np.testing.assert_allclose(update, [0.472136], rtol=1e-5)
    assert int(state.count) == 1
    # optax's convention adds ε to the corrected √v̂ = 2: 2 / 2.5, a larger step.
    adam = optax.scale_by_adam(0.9, 0.95, 0.5)
    update, _ = adam.update(jnp.float32([2.0]), adam.init(jnp.zeros(1)))
    np.testing.assert_allclose(update, [0.8], rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adam_tf"])
def test_updates_equal_a_numpy_loop(name):
    """Five steps with clipping, weight decay and a decaying rate, in float64."""
    rng = np.random.default_rng(0)
    config = make_config(name=name, clip_norm=1.5, weight_decay=0.1, eps=1e-2)
    lr, total = 0.1, 10
    b1, b2, eps = config.b1, config.b2, config.eps
    params, steps = random_tree(rng), 5
    optimizer = make_optimizer(config, lr, total)
    ours = as_float32(params)
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    leaves, treedef = jax.tree.flatten(params)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    m, v = [0.0] * len(leaves), [0.0] * len(leaves)
    for t in range(1, steps + 1):
        # From well below the clipping norm to well above it.
        grads = [0.1 * t * rng.normal(size=leaf.shape) for leaf in leaves]
        updates, state = update(as_float32(treedef.unflatten(grads)), state, ours)
        ours = optax.apply_updates(ours, updates)

        norm = np.sqrt(sum((g**2).sum() for g in grads))
        for i, g in enumerate(grads):
            g = g * min(1.0, 1.5 / norm)
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            if name == "adam":
                step = (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            else:
                alpha = np.sqrt(1 - b2**t) / (1 - b1**t)
                step = alpha * m[i] / (np.sqrt(v[i]) + eps)
            if paths[i][-1].key in ("kernel", "tokens"):
                step = step + 0.1 * leaves[i]
            leaves[i] = leaves[i] - lr * (1 - (t - 1) / total) * step
    assert norm > 1.5
    for got, want in zip(jax.tree.leaves(ours), leaves):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_weight_decay_leaves_norms_and_biases_alone():
    """With zero gradients, matrices shrink by lr · decay and nothing else moves."""
    params = as_float32(random_tree(np.random.default_rng(1)))
    config = make_config(weight_decay=0.5, schedule="constant")
    optimizer = make_optimizer(config, 0.1, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    layers, moved = params["layers"], updates["layers"]
    np.testing.assert_allclose(
        moved["attention"]["query"]["kernel"],
        -0.05 * layers["attention"]["query"]["kernel"],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        updates["embed"]["tokens"], -0.05 * params["embed"]["tokens"], rtol=1e-6
    )
    np.testing.assert_array_equal(moved["attention_norm"]["scale"], 0)
    np.testing.assert_array_equal(moved["mlp"]["up"]["bias"], 0)


SCHEDULES = [
    # 1 − t/4
    ("linear", 0, 4, [1.0, 0.75, 0.5, 0.25, 0.0]),
    # ½ (1 + cos(π t/4))
    ("cosine", 0, 4, [1.0, 0.853553, 0.5, 0.146447, 0.0]),
    ("constant", 0, 4, [1.0, 1.0, 1.0, 1.0, 1.0]),
    # 1/2, 2/2, then 1 − t/4 of the four steps that are left
    ("linear", 2, 6, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
    ("constant", 4, 6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    ("constant", 1, 3, [1.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("name", "warmup", "total", "want"), SCHEDULES)
def test_schedules(name, warmup, total, want):
    schedule = make_schedule(name, 2e-3, warmup, total)
    got = [float(schedule(jnp.int32(step))) for step in range(len(want))]
    np.testing.assert_allclose(got, 2e-3 * np.array(want), rtol=1e-5, atol=1e-9)


def test_learning_rate_is_that_of_the_last_step():
    params = as_float32(random_tree(np.random.default_rng(2)))
    optimizer = make_optimizer(make_config(clip_norm=1.0), 0.1, 4)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for want in (0.1, 0.075, 0.05):
        before = params
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(learning_rate(state), want, rtol=1e-6)
        # With equal gradients every Adam step is of size 1: the rate was really used.
        moved = before["embed"]["tokens"] - params["embed"]["tokens"]
        np.testing.assert_allclose(moved, want, rtol=2e-4)


def test_two_rates_are_read_apart():
    """As PPO has them: one optimizer for each network."""
    optimizer = optax.multi_transform(
        {
            "policy": make_optimizer(make_config(), 0.1, 4),
            "critic": make_optimizer(make_config(), 0.2, 4),
        },
        {"policy": "policy", "critic": "critic"},
    )
    tree = as_float32(random_tree(np.random.default_rng(3)))
    params = {"policy": tree, "critic": tree}
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    rates = {name: learning_rate(state.inner_states[name]) for name in params}
    np.testing.assert_allclose(rates["policy"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates["critic"], 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "config.optimizer.name='sgd' is unknown; take one of adam"),
        ({"schedule": "step"}, "config.optimizer.schedule='step' is unknown"),
        ({"warmup_steps": 10}, "must be at least 0 and less than the run's 10"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
    ],
)
def test_what_cannot_be_made(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(make_config(**changes), 0.1, 10)


def test_weights_learn_at_the_rate_of_the_first_pattern_that_fits():
    params = {"embed": jnp.ones(2), "mlp": {"up": jnp.ones(3), "down": jnp.ones(3)}}
    scales = (("mlp/up", 0.0), ("mlp", 0.5))
    optimizer = scale_by_name(scales)
    got, _ = optimizer.update(params, optimizer.init(params))
    assert (got["embed"] == 1).all()
    assert (got["mlp"]["up"] == 0).all() and (got["mlp"]["down"] == 0.5).all()


def test_lr_scales_that_cannot_be():
    with pytest.raises(UserError, match=r"has the pattern 'mpl', .* they are embed"):
        scale_by_name((("mpl", 0.1),)).init({"embed": jnp.ones(2)})
    with pytest.raises(UserError, match="has -1 for 'mlp'"):
        scale_by_name((("mlp", -1),))


def test_scaled_rates_inside_the_optimizer():
    """Adam's first step is the rate itself, whatever the gradient's size."""
    config = make_config(lr_scales=(("slow", 0.1),))
    optimizer = make_optimizer(config, 1e-2, total_steps=10)
    params = {"slow": jnp.ones(2), "fast": jnp.ones(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["fast"], -1e-2, rtol=1e-3)
    np.testing.assert_allclose(updates["slow"], -1e-3, rtol=1e-3)


def test_scaled_rates_on_a_mesh():
    """The moments' places on the mesh are found with a tree that has no names."""
    params = as_float32(random_tree(np.random.default_rng(0)))
    optimizer = make_optimizer(
        make_config(lr_scales=(("layers/mlp", 0.1),)), 1e-2, total_steps=10
    )
    state = init_optimizer(optimizer, params, sharding.make_mesh())
    updates, _ = optimizer.update(params, state, params)
    size = jax.tree.map(lambda update: jnp.abs(update).max(), updates)
    np.testing.assert_allclose(size["layers"]["mlp"]["up"]["bias"], 1e-3, rtol=1e-3)
    np.testing.assert_allclose(size["embed"]["tokens"], 1e-2, rtol=1e-3)

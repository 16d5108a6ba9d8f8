import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import reinforce_plus_plus_baseline
from rlhf_jax.losses.group_advantages import (
    group_relative,
    leave_one_out,
    opo,
)
from tests.losses import invariants
from tests.losses.grouped import (
    assert_equals_oracle,
    assert_equals_reference,
    few_examples,
    group_loop,
    leave_one_out_loop,
    opo_loop,
    random_groups,
)

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "advantages.npz"
SCALES = ("group", "batch", "none")
NAN = np.nan

in_groups = functools.partial(group_relative, group_size=4, scale="group")
one_out = functools.partial(leave_one_out, group_size=4)
weighted = functools.partial(opo, group_size=4)
whitened = functools.partial(reinforce_plus_plus_baseline, group_size=4)
BY_ROW = {
    "group": in_groups,
    "batch": functools.partial(in_groups, scale="batch"),
    "none": functools.partial(in_groups, scale="none"),
    "leave_one_out": one_out,
}
BY_TOKEN = {"opo": weighted, "reinforce_plus_plus_baseline": whitened}
ALL = BY_ROW | BY_TOKEN


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as file:
        return dict(file)


def example(rng, name, B=12, T=5):
    """Rewards and a mask [B] or [B, T]: three of four scored, one of four, any."""
    rewards = rng.normal(size=B).astype(np.float32)
    scored = rng.random(B) < 0.7
    scored[:8] = [True, False, True, True, False, False, True, False]
    tokens = rng.random((B, T)) < 0.6
    tokens[:, 0] = True
    return rewards, tokens & scored[:, None] if name in BY_TOKEN else scored


# group_relative


def test_group_relative_worked_by_hand():
    # one unscored; all equal; one scored; none scored
    rewards = np.array([1, 3, NAN, 5, 7, 7, 7, 7, NAN, NAN, 2, NAN, *[np.inf] * 4])
    mask = np.isfinite(rewards)
    # mean (1 + 3 + 5) / 3 = 3, variance (4 + 0 + 4) / 2 = 4, std 2: -2 / (2 + 2)
    expected = [-0.5, 0.0, 0.0, 0.5] + [0.0] * 12
    got = group_relative(rewards, mask, group_size=4, scale="group", eps=2.0)
    np.testing.assert_array_equal(got, expected)
    got = group_relative(rewards, mask, group_size=4, scale="none")
    np.testing.assert_array_equal(got, [-2.0, 0.0, 0.0, 2.0] + [0.0] * 12)
    # 1, 3, 5, 7, 7, 7, 7, 2: sum 39, mean 4.875, squares 235 - 8 * 4.875^2 = 44.875,
    # variance 44.875 / 7
    got = group_relative(rewards, mask, group_size=4, scale="batch", eps=0.5)
    scaled = 2.0 / ((44.875 / 7) ** 0.5 + 0.5)
    np.testing.assert_allclose(got, [-scaled, 0, 0, scaled] + [0] * 12, rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@few_examples
@random_groups
def test_group_relative_equals_a_loop(scale, sizes, seed, density):
    rng, (B, G) = np.random.default_rng(seed), sizes
    rewards, mask = rng.normal(size=B).astype(np.float32), rng.random(B) < density
    # ε is large: near a std of zero a difference quotient is no derivative.
    options = {"group_size": G, "scale": scale, "eps": 0.1}
    assert_equals_oracle(group_relative, group_loop, rewards, mask, rng, **options)


@pytest.mark.parametrize("scale", SCALES)
def test_group_relative_equals_trl(reference, scale):
    rewards, mask = reference["rewards"], reference["scored"]
    got = group_relative(rewards, mask, group_size=4, scale=scale, eps=1e-4)
    np.testing.assert_allclose(got, reference[f"trl/{scale}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "eps"),
    [
        ("verl/grpo", "group", 1e-6),
        ("verl/dr_grpo", "none", 1e-6),
        ("openrlhf/group_norm", "group", 1e-9),
        ("openrlhf/dr_grpo", "none", 1e-9),
    ],
)
def test_group_relative_equals_verl_and_openrlhf(reference, name, scale, eps):
    function = functools.partial(group_relative, group_size=4, scale=scale, eps=eps)
    assert_equals_reference(function, reference, name)


@pytest.mark.parametrize("reward", [0.1, 0.7, -3.3, 1e6 / 3])
@pytest.mark.parametrize("G", [3, 6, 7])
def test_equal_rewards_give_exactly_zero(reward, G):
    # 0.1 six times has the mean 0.1 + 7e-9 in float32
    rewards = np.full(2 * G, reward, np.float32)
    for scale in SCALES:
        function = functools.partial(group_relative, scale=scale, eps=1e-9)
        assert not np.asarray(function(rewards, group_size=G)).any()
    assert not np.asarray(leave_one_out(rewards, group_size=G)).any()
    mask = np.arange(3) <= np.arange(2 * G)[:, None] % 3
    assert not np.asarray(opo(rewards, mask, group_size=G)).any()


def test_affine_change_of_rewards_is_irrelevant_with_scale(rng):
    rewards, mask = example(rng, "group")
    for scale in ("group", "batch"):
        function = functools.partial(group_relative, group_size=4, scale=scale)
        np.testing.assert_allclose(
            function(3.0 * rewards + 5.0, mask, eps=3e-4),
            function(rewards, mask, eps=1e-4),
            rtol=1e-5,
            atol=1e-5,
        )


def test_gradient_of_equal_rewards_is_finite():
    cotangent = jnp.array([1.0, 0.0, 0.0, 0.0])

    def first(rewards):
        return (cotangent * in_groups(rewards, eps=0.5)).sum()

    # as for a std that does not move: (1 - 1/4) / 0.5, and -1/4 / 0.5 for the others
    got = jax.grad(first)(jnp.full(4, 0.1))
    np.testing.assert_allclose(got, [1.5, -0.5, -0.5, -0.5], rtol=1e-6)


# leave_one_out


def test_leave_one_out_worked_by_hand():
    rewards = np.array([1, 3, NAN, 8, NAN, 5, NAN, NAN], np.float32)
    # 1 - (3 + 8) / 2 = -4.5;  3 - (1 + 8) / 2 = -1.5;  8 - (1 + 3) / 2 = 6; 5 is alone
    got = leave_one_out(rewards, np.isfinite(rewards), group_size=4)
    np.testing.assert_array_equal(got, [-4.5, -1.5, 0.0, 6.0, 0.0, 0.0, 0.0, 0.0])
    # 2 - 0 and 0 - 2
    got = leave_one_out(np.array([2, 0]), group_size=2)
    np.testing.assert_array_equal(got, [2.0, -2.0])


@few_examples
@random_groups
def test_leave_one_out_equals_a_loop(sizes, seed, density):
    rng, (B, G) = np.random.default_rng(seed), sizes
    rewards, mask = rng.normal(size=B).astype(np.float32), rng.random(B) < density
    assert_equals_oracle(
        leave_one_out, leave_one_out_loop, rewards, mask, rng, group_size=G
    )


def test_leave_one_out_equals_trl(reference):
    got = one_out(reference["rewards"], reference["scored"])
    np.testing.assert_allclose(got, reference["trl/rloo"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["verl/rloo", "openrlhf/rloo"])
def test_leave_one_out_equals_verl_and_openrlhf(reference, name):
    assert_equals_reference(one_out, reference, name)


# opo


def test_opo_worked_by_hand():
    rewards = np.array([4, 0, 7, NAN], np.float32)
    mask = np.array(
        [
            [True, False, False],
            [True, True, True],
            [False, True, False],
            [False, False, False],
        ]
    )
    # lengths 1 and 3: baseline (1 * 4 + 3 * 0) / 4 = 1; then 7 alone in its group
    got = opo(rewards, mask, group_size=2)
    np.testing.assert_array_equal(got, [3.0, -1.0, 0.0, 0.0])


@few_examples
@random_groups
def test_opo_equals_a_loop(sizes, seed, density):
    rng, (B, G) = np.random.default_rng(seed), sizes
    rewards, mask = rng.normal(size=B).astype(np.float32), rng.random((B, 3)) < density
    assert_equals_oracle(opo, opo_loop, rewards, mask, rng, group_size=G)


def test_opo_equals_verl(reference):
    function = lambda rewards: weighted(rewards, reference["mask"])
    assert_equals_reference(function, reference, "verl/opo")


def test_opo_of_equal_lengths_is_the_mean_baseline(rng):
    rewards, _ = example(rng, "opo")
    np.testing.assert_allclose(
        weighted(rewards, np.ones((12, 5), bool)),
        group_relative(rewards, group_size=4, scale="none"),
        rtol=1e-6,
        atol=1e-6,
    )


# What holds for all that compare within groups

each = pytest.mark.parametrize("name", ALL)


@pytest.mark.parametrize("function", BY_ROW.values(), ids=BY_ROW)
def test_unscored_rows_do_not_count(rng, function):
    """A group with unscored rows is the smaller group without them."""
    rewards, _ = example(rng, "group")
    slots = np.array([0, 3, 4, 5, 8, 10])
    small = function(rewards[slots], group_size=2)
    large = np.asarray(function(rewards, np.isin(np.arange(12), slots)))
    np.testing.assert_allclose(large[slots], small, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(
        function(rewards), function(rewards, np.ones(12, bool))
    )


@each
def test_order_of_groups_and_within_them_is_irrelevant(rng, name):
    rewards, mask = example(rng, name)
    order = np.array([[9, 8, 11, 10], [1, 2, 3, 0], [4, 7, 5, 6]]).reshape(-1)
    plain = np.asarray(ALL[name](rewards, mask))
    permuted = ALL[name](rewards[order], mask[order])
    np.testing.assert_allclose(permuted, plain[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["group", "none", "leave_one_out", "opo"])
def test_each_group_alone_gives_the_same(rng, name):
    rewards, mask = example(rng, name)
    whole = np.asarray(ALL[name](rewards, mask))
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = ALL[name](rewards[rows], mask[rows])
        np.testing.assert_allclose(alone, whole[rows], rtol=1e-6, atol=1e-7)


@each
def test_sharded_rows_give_the_same(rng, name):
    """Two rows a device: a group of four is spread over two of eight."""
    rewards, mask = example(rng, name, B=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.jit(ALL[name], in_shardings=rows, out_shardings=rows)(rewards, mask)
    assert len(sharded.sharding.device_set) == 8
    plain = jax.jit(ALL[name])(rewards, mask)
    np.testing.assert_allclose(sharded, plain, rtol=1e-6, atol=1e-7)


@each
def test_integer_rewards_give_float32(rng, name):
    _, mask = example(rng, name)
    assert ALL[name](np.arange(12), mask).dtype == jnp.float32


@each
def test_wrong_shape_raises(rng, name):
    rewards, mask = example(rng, name)
    if name in BY_ROW:
        names = ["rewards", "mask"]
        invariants.assert_wrong_shapes_raise(ALL[name], [rewards, mask], names)
        with pytest.raises(
            ValueError, match=r"rewards has .* \(1, 12\), expected \[B\]"
        ):
            ALL[name](rewards[None], mask[None])
        return
    with pytest.raises(ValueError, match=r"rewards has .* \(11,\), expected \(12,\)"):
        ALL[name](rewards[:11], mask)
    with pytest.raises(ValueError, match=r"mask has .* \(12,\), expected \[B, T\]"):
        ALL[name](rewards, mask[:, 0])


@pytest.mark.parametrize("group_size", [1, 0, -4, 5])
@each
def test_group_size_that_does_not_divide_raises(rng, name, group_size):
    with pytest.raises(ValueError, match=rf"group_size is {group_size}, .* 12 rows"):
        ALL[name](*example(rng, name), group_size=group_size)


def test_unknown_scale_and_zero_eps_raise(rng):
    rewards, _ = example(rng, "group")
    with pytest.raises(ValueError, match=r"scale is 'std', .* group, batch, none"):
        group_relative(rewards, group_size=4, scale="std")
    with pytest.raises(ValueError, match=r"eps is 0.0, expected"):
        group_relative(rewards, group_size=4, scale="group", eps=0.0)

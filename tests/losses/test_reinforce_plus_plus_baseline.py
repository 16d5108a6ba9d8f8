import functools
import pathlib

import numpy as np
import pytest

from rlhf_jax.losses import reinforce_plus_plus_baseline
from tests.losses.grouped import (
    assert_equals_oracle,
    assert_equals_reference,
    baseline_loop,
    few_examples,
    random_groups,
)

whitened = functools.partial(reinforce_plus_plus_baseline, group_size=4)
FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "advantages.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as file:
        return dict(file)


def test_baseline_worked_by_hand():
    mask = np.array([[True, True, False, True], [False, False, True, False]])
    # 5 - 3 = 2 on three tokens, 1 - 3 = -2 on one: mean 1, variance (3 * 1 + 9) / 4 = 3
    got = reinforce_plus_plus_baseline(np.array([5, 1]), mask, group_size=2, eps=1.0)
    # (2 - 1) / sqrt(3 + 1) and (-2 - 1) / sqrt(3 + 1)
    expected = [[0.5, 0.5, 0.0, 0.5], [0.0, 0.0, -1.5, 0.0]]
    np.testing.assert_array_equal(got, expected)


@few_examples
@random_groups
def test_baseline_equals_a_loop(sizes, seed, density):
    rng, (B, G) = np.random.default_rng(seed), sizes
    rewards, mask = rng.normal(size=B).astype(np.float32), rng.random((B, 3)) < density
    options = {"group_size": G, "eps": 0.1}
    function = reinforce_plus_plus_baseline
    assert_equals_oracle(function, baseline_loop, rewards, mask, rng, **options)


def test_baseline_equals_openrlhf(reference):
    function = lambda rewards: whitened(rewards, reference["mask"])
    assert_equals_reference(function, reference, "openrlhf/reinforce_baseline")


def test_baseline_equals_verl_but_for_the_divisor(reference):
    # verl divides the squares by n - 1
    n = reference["mask"].sum()
    function = lambda rewards: whitened(rewards, reference["mask"])
    factor = np.float32((n / (n - 1)) ** 0.5)
    assert_equals_reference(
        function, reference, "verl/reinforce_plus_plus_baseline", factor
    )

"""What holds for every kernel, on batches of random shapes and masks."""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import losses
from tests.losses import invariants
from tests.losses.catalogue import KERNELS

# Few sizes, for each is compiled; the masks and the numbers are as many as examples.
sizes = st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 6)])
on_random_batches = settings(max_examples=12, deadline=None, derandomize=True)
random_batches = given(size=sizes, seed=st.integers(0, 2**16))
each_kernel = pytest.mark.parametrize("name", KERNELS)
each_row_alone = pytest.mark.parametrize(
    "name", [name for name, kernel in KERNELS.items() if not kernel.whole_batch]
)

# Checked in their own tests: they have no mask, or are a name for what is above.
WITHOUT_A_MASK = {
    "aggregation": {"aggregate"},
    "constrained": {"combined_reward", "cost_ema", "lagrangian_update"},
    "direct_preference": {"reverse_kl", "forward_kl", "js", "alpha_divergence"},
    "evolution": {"evolution_gradient", "evolution_update"},
    "group_advantages": {"overlong_penalty"},
    "kl": {"ratio"},
    "perturbations": {
        *("perturbation", "perturb", "low_rank_noise", "densify", "low_rank_matmul"),
        *("member_key", "leaf_keys"),
    },
    "policy": {"adaptive_kl_coef", "missing_eos_penalty"},
    "policy_variants": {"variant"},
}


def example(name, size, seed):
    return KERNELS[name].example(np.random.default_rng(seed), *size)


@each_kernel
@on_random_batches
@random_batches
def test_padding_is_irrelevant(name, size, seed):
    invariants.assert_padding_is_irrelevant(
        KERNELS[name].call, *example(name, size, seed)
    )


@each_kernel
@on_random_batches
@random_batches
def test_batch_order_is_irrelevant(name, size, seed):
    kernel = KERNELS[name]
    invariants.assert_batch_order_is_irrelevant(
        kernel.call, *example(name, size, seed), group=kernel.group
    )


@each_row_alone
@on_random_batches
@random_batches
def test_microbatches_sum_to_the_whole(name, size, seed):
    kernel = KERNELS[name]
    invariants.assert_microbatches_sum_to_the_whole(
        kernel.call, *example(name, size, seed), group=kernel.group
    )


@each_kernel
def test_nothing_real_gives_zero(name):
    """And one, where the result is a factor: a ratio of policies or a weight."""
    arrays, mask = example(name, (3, 4), 0)
    result = jax.jit(KERNELS[name].call)(*arrays, mask & False)
    if isinstance(result, tuple) and isinstance(result[-1], losses.PolicyDiagnostics):
        loss, diagnostics = result
        result = loss, diagnostics._replace(ratio=diagnostics.ratio - 1.0)
    neutral = 1.0 if "wpo_weights" in name else 0.0
    for x in jax.tree.leaves(result):
        np.testing.assert_array_equal(x, jnp.full_like(x, neutral))


@each_kernel
def test_an_empty_mask_raises(name):
    arrays, mask = example(name, (3, 4), 0)
    with pytest.raises(ValueError, match=r"has shape \(0.* at least one entry"):
        KERNELS[name].call(*(x[:0] for x in arrays), mask[:0])


@each_kernel
def test_jit_equals_eager(name):
    arrays, mask = example(name, (3, 4), 1)
    invariants.assert_jit_equals_eager(KERNELS[name].call, *arrays, mask)


# products of hidden states are taken in their own dtype, which their own tests check
@pytest.mark.parametrize(
    "name", [name for name, kernel in KERNELS.items() if "h" not in kernel.arrays]
)
def test_bfloat16_gives_float32(name):
    arrays, mask = example(name, (3, 4), 2)
    invariants.assert_bfloat16_gives_float32(KERNELS[name].call, arrays, mask)


def test_every_kernel_is_checked():
    """A new function must be in the catalogue, or be named here as one without mask."""
    found = set()
    for module in pkgutil.iter_modules(losses.__path__):
        if module.name.startswith("_"):
            continue
        members = vars(importlib.import_module(f"{losses.__name__}.{module.name}"))
        exempt = WITHOUT_A_MASK.get(module.name, ())
        for name, member in members.items():
            own = (
                inspect.isfunction(member) and member.__module__ == members["__name__"]
            )
            if own and not name.startswith("_") and name not in exempt:
                found.add(f"{module.name}.{name}")
    assert found == {name.partition(" ")[0] for name in KERNELS}


# Identities of the algorithms

POLICY_LOSSES = [name for name in KERNELS if KERNELS[name].arrays in ("llxm", "llXm")]


@on_random_batches
@given(seed=st.integers(0, 2**16))
def test_at_ratio_one_the_gradient_is_the_vanilla_policy_gradient(seed):
    """−A ∇log π at each token, for every policy loss at its first step."""
    rng = np.random.default_rng(seed)
    old_logprobs = -rng.exponential(1.0, (3, 4)).astype(np.float32)
    advantages = rng.normal(size=3).astype(np.float32)
    mask = rng.random((3, 4)) < 0.7
    by_token = np.where(mask, np.broadcast_to(advantages[:, None], mask.shape), 0.0)

    def total(logprobs, kernel, advantages):
        return kernel.call(logprobs, old_logprobs, advantages, mask)[0].sum()

    for name in POLICY_LOSSES:
        per_row = KERNELS[name].arrays == "llXm"
        gradient = jax.grad(total)(
            old_logprobs, KERNELS[name], advantages if per_row else by_token
        )
        np.testing.assert_allclose(gradient, -by_token, rtol=1e-5, atol=1e-6)


@on_random_batches
@given(seed=st.integers(0, 2**16))
def test_k3_is_never_negative_and_zero_at_equality(seed):
    rng = np.random.default_rng(seed)
    logprobs, ref_logprobs = -rng.exponential(3.0, (2, 3, 4)).astype(np.float32)
    mask = np.ones((3, 4), bool)
    assert (np.asarray(losses.kl.k3(logprobs, ref_logprobs, mask)) >= 0).all()
    assert not np.asarray(losses.kl.k3(logprobs, logprobs, mask)).any()


@on_random_batches
@given(seed=st.integers(0, 2**16), beta=st.floats(0.01, 5.0))
def test_dpo_at_the_reference_is_log_two(seed, beta):
    pairs = np.random.default_rng(seed).normal(-50.0, 20.0, (2, 4)).astype(np.float32)
    got = losses.dpo(*pairs, *pairs, beta=beta, loss_type="sigmoid")
    np.testing.assert_allclose(got, jnp.full(4, 0.6931472), rtol=1e-6)

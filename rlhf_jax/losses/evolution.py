"""Evolution strategies: the gradient from noise and fitness, and a step along it.

N members of a population, D in, O out, R rank. Member i is scored at θ̂ᵢ = θ + σ εᵢ
(`perturbations`), its score is shaped to Fᵢ (`fitness`), and ĝ = 1/(N σ) Σᵢ Fᵢ εᵢ
ascends E[F(θ + σ ε)]: for normal ε exactly, for ε of low rank to first order in σ, or
as R grows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    INF,
    MAX,
    TINY,
    check_float,
    check_integer,
    check_range,
    check_rank,
    check_same_shape,
    check_scalars,
    check_shape,
    float32,
    is_number,
)
from rlhf_jax.losses._trees import check_same_structure, named_leaves
from rlhf_jax.losses.perturbations import (
    EXACT,
    FROZEN,
    FULL,
    LowRank,
    leaf_keys,
    low_rank_noise,
    member_key,
)


def evolution_gradient(
    params: Any,
    key: jax.Array,
    members: jax.Array,
    fitness: jax.Array,
    *,
    sigma: float | jax.Array,
    population_size: int,
    antithetic: bool,
    ranks: Any = None,
) -> Any:
    """The direction in which the population found higher fitness.

    ĝ = 1/(N σ) Σᵢ Fᵢ εᵢ

    The sum is over the members given and N is the whole population, so results add up
    over micro-batches and, by psum, over devices. Full noise is in memory for one
    member at a time, low-rank factors for all that are given: pass many in parts. Of an
    antithetic pair, the even member with F₂ₖ − F₂ₖ₊₁ gives both for half the work.

    Args:
      params: the tree that was perturbed; only its shapes matter.
      key: the key of the perturbations.
      members: int [n], ids; all of them, or those of this device.
      fitness: float [n], Fᵢ of these members, shaped over the whole population.
      sigma: σ, above 0; 1 for "ES at scale", which leaves the 1/σ to its step α.
      population_size: N, on all devices, at least n; even if antithetic. A member whose
        fitness was masked counts: it adds zero, so ĝ is smaller by their share.
      antithetic: whether members 2k and 2k + 1 were a pair.
      ranks: those of the perturbations, an int for each leaf; None for full noise.

    Returns:
      a tree like params, float32. Ascend it; an optimizer that descends wants −ĝ.
      EGGROLL gives its own −√N σ² ĝ.

    Raises:
      ValueError: a shape does not fit, members are not integers, a number is out of
        range, or as `perturbation`.

    References:
      Salimans et al. 2017, algorithm 2, https://arxiv.org/abs/1703.03864
      σ = 1: Qiu et al. 2025 ("ES at scale"), https://arxiv.org/abs/2509.24372
    """
    check_rank("n", members=members)
    check_same_shape(members=members, fitness=fitness)
    check_integer("members", members)
    members = jnp.asarray(members)
    check_scalars(sigma=sigma, population_size=population_size)
    check_range("sigma", sigma, TINY, INF)
    check_range("population_size", population_size, len(members), INF)
    if antithetic and is_number(population_size) and population_size % 2:
        raise ValueError(
            f"population_size is {population_size}, expected an even one of pairs."
        )

    leaves, treedef = leaf_keys(params, key, ranks)
    F = float32(fitness) / (float32(population_size) * float32(sigma))
    return treedef.unflatten(_weighted_sum(*x, members, F, antithetic) for x in leaves)


def evolution_update(params: Any, gradient: Any, *, lr: float | jax.Array) -> Any:
    """A plain step of evolution strategies, up the gradient.

    θ′ = θ + α ĝ,  with σ = 1 in ĝ the rule of "ES at scale", θ + α/N Σᵢ Zᵢ εᵢ

    Small steps are lost in the 8 bits of bfloat16: at α = 5e-4 and N = 30, steps of
    deviation α/√N, a third of weights of deviation 0.02 did not move. Keep master
    weights in float32, update those, and cast a copy.

    Args:
      params: θ, a tree of float arrays.
      gradient: ĝ of the whole population, a tree like params.
      lr: α, at least 0; the α of "ES at scale" is this α / σ if ĝ has its 1/σ.

    Returns:
      a tree like params, of the same dtypes; added in float32.

    Raises:
      ValueError: α is out of range or not a scalar, a leaf is not a float array or a
        `LowRank`, or the trees differ in structure or a leaf in shape.

    References:
      Qiu et al. 2025 ("ES at scale"), https://arxiv.org/abs/2509.24372
    """
    check_scalars(lr=lr)
    check_range("lr", lr, 0.0, MAX)
    thetas, steps = _arrays("params", params), _arrays("gradient", gradient)
    check_same_structure("gradient", gradient, params)
    for (name, theta), (other, g) in zip(thetas.items(), steps.items(), strict=True):
        check_shape(other, g, np.shape(theta), f"the shape of {name}")

    def move(theta, g):
        return (float32(theta) + float32(lr) * float32(g)).astype(theta.dtype)

    return jax.tree.map(move, params, gradient)


def _arrays(name, tree):
    """The leaves by name; raises unless all are float arrays."""
    leaves = named_leaves(name, tree, is_leaf=lambda x: isinstance(x, LowRank))
    for path, leaf in leaves.items():
        if isinstance(leaf, LowRank):
            raise ValueError(f"{path} is a LowRank, expected an array: densify it.")
        check_float(path, leaf)
    return leaves


def _weighted_sum(key, shape, rank, members, weights, antithetic):
    """Σᵢ wᵢ εᵢ for one leaf."""
    if rank == FROZEN:
        return jnp.zeros(shape, jnp.float32)
    if rank != FULL:
        options = {"rank": rank, "antithetic": antithetic}
        A, B = jax.vmap(lambda i: low_rank_noise(key, shape, i, **options))(members)
        return jnp.einsum("n,n...dr,n...or->...do", weights, A, B, precision=EXACT)
    keys, signs = jax.vmap(lambda i: member_key(key, i, antithetic=antithetic))(members)
    draw = lambda key, weight: weight * jax.random.normal(key, shape, jnp.float32)
    add = lambda total, one: (total + draw(*one), None)
    weights = weights * signs
    # Like the weights, because in shard_map a carry has to vary as they do.
    zero = jnp.zeros_like(weights, shape=shape)
    return jax.lax.scan(add, zero, (keys, weights))[0]

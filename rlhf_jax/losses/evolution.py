"""Evolution strategies: noise on the weights, shaped fitness, the gradient from both.

N members of a population, G group, D in, O out, R rank, T tokens. Member i is scored at
θ̂ᵢ = θ + σ εᵢ, and ĝ = 1/(N σ) Σᵢ Fᵢ εᵢ ascends E[F(θ + σ ε)].

The noise of a member is a function of (key, member), made again where it is needed and
never stored: fold the iteration into the key, and give each member an id. Every leaf
has a key of its own, so leaves of one shape get different noise. θ is never changed and
changed back, which drifts: perturbed weights are new arrays.

`ranks` says what noise each leaf gets, as a tree like the params with an int at each
leaf. R ≥ 1: of rank R on the last two axes, `[in, out]`; `[L, in, out]` is L matrices.
FULL: a normal number for each weight; the right one for vectors stacked to `[L, D]`.
FROZEN: none. `ranks=None` is FULL everywhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import masked
from rlhf_jax.losses._checks import (
    TINY,
    boolean,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
)

FULL, FROZEN, INF = 0, -1, float("inf")
# An accelerator's default rounds float32 to 10 bits; thin products cost little.
EXACT = jax.lax.Precision.HIGHEST


class LowRank(NamedTuple):
    """A Bᵀ = E, float32 [..., D, R] and [..., O, R]; A has the sign and 1/√R in it."""

    A: jax.Array
    B: jax.Array


def perturbation(
    params: Any, key: jax.Array, member: jax.Array, *, antithetic: bool, ranks=None
) -> Any:
    """The noise ε of one member, for every leaf of the params.

    ε = ±z,  z ~ N(0, I) from fold_in(fold_in(key, leaf), member)

    Args:
      params: tree of float arrays or ShapeDtypeStructs; only their shapes matter.
      key: a threefry key (JAX's default), for example fold_in(root, iteration).
      member: its id, an int scalar, at least 0.
      antithetic: whether members 2k and 2k + 1 are a pair with the noise z and −z.
      ranks: an int for each leaf, as the module says.

    Returns:
      a tree like params: float32 of the shape of each leaf and of variance one, a
      `LowRank` where the rank is at least 1, zeros where FROZEN.

    Raises:
      ValueError: a leaf is not float, or `ranks`, member or the kind of key is wrong.

    References:
      Salimans et al. 2017, algorithm 2, https://arxiv.org/abs/1703.03864
    """
    leaves, treedef = _flatten(params, key, ranks)
    return treedef.unflatten(_noise(*x, member, antithetic) for x in leaves)


def perturb(
    params: Any,
    key: jax.Array,
    member: jax.Array,
    *,
    sigma: float | jax.Array,
    antithetic: bool,
    ranks=None,
) -> Any:
    """The weights of one member.

    θ̂ = θ + σ ε,  added in float32; θ itself, bit for bit, where σ ε is zero

    Args:
      params: θ, a tree of float arrays.
      key, member, antithetic, ranks: as in `perturbation`.
      sigma: σ, at least 0, in units of the weights.

    Returns:
      a tree like params, of the same dtypes. A small σ ε is lost in the 8 bits of
      bfloat16: perturb float32 weights and cast the result.

    Raises:
      ValueError: as in `perturbation`, or σ is negative.

    References:
      Salimans et al. 2017, algorithm 2, https://arxiv.org/abs/1703.03864
    """
    check_range("sigma", sigma, 0.0, INF)
    noise = perturbation(params, key, member, antithetic=antithetic, ranks=ranks)

    def move(theta, epsilon):
        step = float32(sigma) * epsilon
        # -0.0 + 0.0 is 0.0, another bit pattern
        return jnp.where(step == 0, theta, (float32(theta) + step).astype(theta.dtype))

    return jax.tree.map(move, params, densify(noise))


def low_rank_noise(
    key: jax.Array, shape: tuple, member: jax.Array, *, rank: int, antithetic: bool
) -> LowRank:
    """The noise of one matrix, or of a stack of them, as two thin factors.

    E = ± A Bᵀ / √R,  Aᵢᵣ, Bⱼᵣ ~ N(0, 1),  so E[Eᵢⱼ] = 0 and E[Eᵢⱼ²] = 1

    Args:
      key: the PRNG key of this matrix; another for each.
      shape: [..., D, O].
      member, antithetic: as in `perturbation`.
      rank: R, at least 1.

    Returns:
      `LowRank` of float32 [..., D, R] and [..., O, R].

    Raises:
      ValueError: as in `perturbation`, the shape is no matrix, or R < 1.

    References:
      Sarkar et al. 2025 (EGGROLL), https://arxiv.org/abs/2511.16652
    """
    if len(shape) < 2:
        raise ValueError(f"shape is {tuple(shape)}, expected [..., in, out].")
    check_range("rank", rank, 1, INF)
    key, sign = _of_member(key, member, antithetic)
    key_A, key_B = jax.random.split(key)
    *stack, D, O = shape  # noqa: E741
    A = jax.random.normal(key_A, (*stack, D, rank), jnp.float32)
    B = jax.random.normal(key_B, (*stack, O, rank), jnp.float32)
    return LowRank(A * (sign / np.float32(np.sqrt(rank))), B)


def densify(noise: Any) -> Any:
    """The same tree of noise with the matrix E = A Bᵀ in place of each `LowRank`."""

    def dense(x):
        if not isinstance(x, LowRank):
            return x
        return jnp.einsum("...dr,...or->...do", *x, precision=EXACT)

    return jax.tree.map(dense, noise, is_leaf=lambda x: isinstance(x, LowRank))


def low_rank_matmul(
    x: jax.Array, kernel: jax.Array, noise: LowRank, *, sigma: float | jax.Array
) -> jax.Array:
    """A linear layer of all members at once, without a kernel for each.

    yₙ = xₙ (W + σ Eₙ) = xₙ W + σ (xₙ Aₙ) Bₙᵀ

    The first product is one for all members, in the dtype of x and summed in float32.

    Args:
      x: float [N, T, D], inputs of each member.
      kernel: float [D, O], W, shared by all.
      noise: `LowRank` of [N, D, R] and [N, O, R], by vmap of `low_rank_noise`.
      sigma: σ, at least 0.

    Returns:
      float32 [N, T, O].

    Raises:
      ValueError: a shape does not fit, or σ is negative.

    References:
      Sarkar et al. 2025 (EGGROLL), https://arxiv.org/abs/2511.16652
    """
    check_rank("N T D", x=x)
    check_rank("D O", kernel=kernel)
    (N, _, D), (_, O), R = np.shape(x), np.shape(kernel), np.shape(noise.A)[-1]  # noqa: E741
    check_shape("kernel", kernel, (D, O), "the D of x")
    check_shape("noise.A", noise.A, (N, D, R), "the N and D of x")
    check_shape("noise.B", noise.B, (N, O, R), "of x, kernel and noise.A")
    check_range("sigma", sigma, 0.0, INF)
    kernel = jnp.asarray(kernel, jnp.asarray(x).dtype)
    shared = jnp.einsum("ntd,do->nto", x, kernel, preferred_element_type=jnp.float32)
    thin = jnp.einsum("ntd,ndr->ntr", float32(x), noise.A, precision=EXACT)
    own = jnp.einsum("ntr,nor->nto", thin, noise.B, precision=EXACT)
    return shared + float32(sigma) * own


def z_score(
    fitness: jax.Array,
    mask: jax.Array | None = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-16,
) -> jax.Array:
    """Fitness on the scale of its population.

    Zᵢ = (Fᵢ − μ) / √(s² + ε),  s² the variance of all, biased

    μ is the mean of all, or with group_size of the G members with the same prompt.
    Equal fitness gives exactly zero, not the rounding of its mean by √ε.

    Args:
      fitness: float [N], of the population on all devices.
      mask: bool [N], True = a member that was scored; None when all were.
      group_size: G, divides N: the first G members are a group, then the next.
      eps: ε; 1e-5 in EGGROLL.

    Returns:
      float32 [N] without gradient; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or G does not divide N.

    References:
      Qiu et al. 2025 ("ES at scale"), https://arxiv.org/abs/2509.24372
      Groups: Sarkar et al. 2025 (EGGROLL), https://arxiv.org/abs/2511.16652
    """
    fitness, mask = _fitness(fitness, mask)
    N = len(fitness)
    G = N if group_size is None else group_size
    if G < 1 or N % G:
        raise ValueError(f"group_size is {G}, expected a divisor of N = {N}.")
    variance = masked.mean(jnp.square(_center(fitness, mask)), mask)
    centered = _center(fitness.reshape(-1, G), mask.reshape(-1, G)).reshape(N)
    return centered * jax.lax.rsqrt(variance + eps)


def centered_ranks(fitness: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Fitness by its rank alone, from −½ for the worst to ½ for the best.

    Zᵢ = rankᵢ / (N − 1) − ½,  rank = 0 … N − 1, and of ties their mean

    Args:
      fitness: float [N], of the population on all devices; a nan stays nan.
      mask: bool [N], True = a member that was scored; None when all were.

    Returns:
      float32 [N] without gradient, of mean zero; zero in masked slots.

    Raises:
      ValueError: a shape does not fit.

    References:
      Salimans et al. 2017, section 2.1, https://arxiv.org/abs/1703.03864
    """
    fitness, mask = _fitness(fitness, mask)
    count = mask.sum()
    ordered = jnp.sort(jnp.where(mask, fitness, jnp.inf))
    below = jnp.searchsorted(ordered, fitness, side="left")
    up_to = jnp.minimum(jnp.searchsorted(ordered, fitness, side="right"), count)
    # A tie has the ranks below ... up_to - 1. Their mean, less (N - 1) / 2:
    ranks = 0.5 * float32(below + up_to - count) / float32(jnp.maximum(count - 1, 1))
    return jnp.where(mask, jnp.where(jnp.isnan(fitness), jnp.nan, ranks), 0.0)


def evolution_gradient(
    params: Any,
    key: jax.Array,
    members: jax.Array,
    fitness: jax.Array,
    *,
    sigma: float | jax.Array,
    population_size: int,
    antithetic: bool,
    ranks=None,
) -> Any:
    """The direction in which the population found higher fitness.

    ĝ = 1/(N σ) Σᵢ Fᵢ εᵢ

    The sum is over the members given and N is the whole population, so results add up
    over micro-batches and, by psum, over devices. Full noise is in memory for one
    member at a time, low-rank factors for all that are given: pass many in parts. Of an
    antithetic pair, the even member with F₂ₖ − F₂ₖ₊₁ gives both for half the work.

    Args:
      params, key, antithetic, ranks: as in `perturbation`, and as they were there.
      members: int [n], ids; all of them, or those of this device.
      fitness: float [n], Fᵢ of these members, shaped over the whole population.
      sigma: σ, above 0; 1 for "ES at scale", which leaves the 1/σ to its step α.
      population_size: N, on all devices.

    Returns:
      a tree like params, float32. Ascend it; an optimizer that descends wants −ĝ.

    Raises:
      ValueError: a shape does not fit, a number is out of range, or as `perturbation`.

    References:
      Salimans et al. 2017, algorithm 2, https://arxiv.org/abs/1703.03864
      σ = 1: Qiu et al. 2025 ("ES at scale"), https://arxiv.org/abs/2509.24372
    """
    check_rank("n", members=members)
    check_same_shape(members=members, fitness=fitness)
    check_range("sigma", sigma, TINY, INF)
    check_range("population_size", population_size, 1, INF)
    leaves, treedef = _flatten(params, key, ranks)
    members, F = jnp.asarray(members), float32(fitness) / (population_size * sigma)
    return treedef.unflatten(_weighted_sum(*x, members, F, antithetic) for x in leaves)


def evolution_update(params: Any, gradient: Any, *, lr: float | jax.Array) -> Any:
    """A plain step of evolution strategies, up the gradient.

    θ′ = θ + α ĝ,  with σ = 1 in ĝ the rule of "ES at scale", θ + α/N Σᵢ Zᵢ εᵢ

    Args:
      params, gradient: θ and the ĝ of the whole population, trees of float arrays.
      lr: α; the α of "ES at scale" is this α / σ if ĝ has its 1/σ.

    Returns:
      a tree like params, of the same dtypes; added in float32.

    Raises:
      ValueError: the trees differ in structure.

    References:
      Qiu et al. 2025 ("ES at scale"), https://arxiv.org/abs/2509.24372
    """
    step = lambda theta, g: (float32(theta) + lr * g).astype(theta.dtype)
    return jax.tree.map(step, params, gradient)


def _noise(key, shape, rank, member, antithetic):
    if rank == FROZEN:
        return jnp.zeros(shape, jnp.float32)
    if rank != FULL:
        return low_rank_noise(key, shape, member, rank=rank, antithetic=antithetic)
    key, sign = _of_member(key, member, antithetic)
    return sign * jax.random.normal(key, shape, jnp.float32)


def _of_member(key, member, antithetic):
    """The key of a member's noise, and its sign."""
    check_range("member", member, 0, 2**32 - 1)
    if str(jax.random.key_impl(key)) != "threefry2x32":
        # Others draw other numbers under vmap, so noise could not be made again.
        raise ValueError(f"key is {jax.random.key_impl(key)}, expected threefry2x32.")
    size = 2 if antithetic else 1
    sign = jnp.where(jnp.asarray(member) % size == 0, 1.0, jnp.float32(-1.0))
    return jax.random.fold_in(key, member // size), sign


def _weighted_sum(key, shape, rank, members, weights, antithetic):
    """Σᵢ wᵢ εᵢ for one leaf."""
    if rank == FROZEN:
        return jnp.zeros(shape, jnp.float32)
    if rank != FULL:
        A, B = jax.vmap(lambda i: _noise(key, shape, rank, i, antithetic))(members)
        return jnp.einsum("n,n...dr,n...or->...do", weights, A, B, precision=EXACT)
    keys, signs = jax.vmap(lambda i: _of_member(key, i, antithetic))(members)
    draw = lambda key, weight: weight * jax.random.normal(key, shape, jnp.float32)
    add = lambda total, one: (total + draw(*one), None)
    # Made from the weights, because in shard_map a carry has to vary as they do.
    zero = jnp.where((weights * signs).sum() == 0, 0.0, jnp.float32(0.0))
    return jax.lax.scan(add, jnp.full(shape, zero), (keys, weights * signs))[0]


def _flatten(params, key, ranks):
    """Key, shape and rank of each leaf, and the structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    given = treedef if ranks is None else jax.tree.structure(ranks)
    if given != treedef:
        raise ValueError(f"ranks is {given}, expected the tree of params, {treedef}.")
    ranks = [FULL] * len(leaves) if ranks is None else jax.tree.leaves(ranks)
    for (path, leaf), rank in zip(leaves, ranks, strict=True):
        name, shape = jax.tree_util.keystr(path), leaf.shape
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params{name} is {leaf.dtype}, expected a float dtype.")
        if type(rank) is not int or rank < FROZEN or (rank > 0 and len(shape) < 2):
            raise ValueError(
                f"ranks{name} is {rank} for shape {shape}, expected FULL, FROZEN, or "
                "an int of at least 1 for a leaf [..., in, out]."
            )
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return list(zip(keys, [x.shape for _, x in leaves], ranks, strict=True)), treedef


def _fitness(fitness, mask):
    """Both as float32 and bool, checked, with zero where masked and no gradient."""
    check_rank("N", fitness=fitness)
    mask = jnp.ones(np.shape(fitness), bool) if mask is None else mask
    check_same_shape(fitness=fitness, mask=mask)
    mask = boolean(mask)
    return jax.lax.stop_gradient(jnp.where(mask, float32(fitness), 0.0)), mask


def _center(x, mask):
    """Less the mean over the last axis, and exactly zero where all are equal."""
    low = jnp.where(mask, x, jnp.inf).min(-1, keepdims=True)
    x = jnp.where(mask, x - low, 0.0)
    return jnp.where(mask, x - masked.mean(x, mask, axis=-1)[..., None], 0.0)

"""Noise on the weights of a population, full or of low rank, for `evolution`.

N members of a population, D in, O out, R rank, T tokens. The noise of a member is a
function of (key, member), made again where it is needed and never stored: fold the
iteration into the key, and give each member an id. Every leaf has a key of its own, so
leaves of one shape get different noise. θ is never changed and changed back, which
drifts: perturbed weights are new arrays.

`ranks` says what noise each leaf gets, as a tree like the params with an int at each
leaf: `jax.tree.map(lambda leaf: 4 if leaf.ndim > 1 else FULL, params)`.
R ≥ 1: of rank R on the last two axes, `[in, out]`; `[L, in, out]` is L matrices.
FULL: a normal number for each weight; the right one for vectors stacked to `[L, D]`.
FROZEN: none. `ranks=None` is FULL everywhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    INF,
    check_float,
    check_integer,
    check_range,
    check_rank,
    check_scalars,
    check_shape,
    check_whole,
    float32,
)
from rlhf_jax.losses._trees import check_same_structure, named_leaves

FULL, FROZEN = 0, -1
# An accelerator's default rounds float32 to 10 bits; thin products cost little.
EXACT = jax.lax.Precision.HIGHEST


class LowRank(NamedTuple):
    """A Bᵀ = E, float32 [..., D, R] and [..., O, R]; A has the sign and 1/√R in it."""

    A: jax.Array
    B: jax.Array


def perturbation(
    params: Any,
    key: jax.Array,
    member: jax.Array,
    *,
    antithetic: bool,
    ranks: Any = None,
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
    leaves, treedef = leaf_keys(params, key, ranks)
    return treedef.unflatten(_leaf_noise(*x, member, antithetic) for x in leaves)


def perturb(
    params: Any,
    key: jax.Array,
    member: jax.Array,
    *,
    sigma: float | jax.Array,
    antithetic: bool,
    ranks: Any = None,
) -> Any:
    """The weights of one member.

    θ̂ = θ + σ ε,  added in float32; θ itself, bit for bit, where σ ε is zero

    Args:
      params: θ, a tree of float arrays.
      key: a threefry key (JAX's default), for example fold_in(root, iteration).
      member: its id, an int scalar, at least 0.
      sigma: σ, at least 0, in units of the weights.
      antithetic: whether members 2k and 2k + 1 are a pair with the noise z and −z.
      ranks: an int for each leaf, as the module says.

    Returns:
      a tree like params, of the same dtypes. A small σ ε is lost in the 8 bits of
      bfloat16: perturb float32 weights and cast the result.

    Raises:
      ValueError: as in `perturbation`, or σ is negative or not a scalar.

    References:
      Salimans et al. 2017, algorithm 2, https://arxiv.org/abs/1703.03864
    """
    check_scalars(sigma=sigma)
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
      member: its id, an int scalar, at least 0.
      rank: R, a whole number of at least 1.
      antithetic: whether members 2k and 2k + 1 are a pair with the noise E and −E.

    Returns:
      `LowRank` of float32 [..., D, R] and [..., O, R].

    Raises:
      ValueError: as in `perturbation`, the shape is no matrix, or R is no whole
        number of at least 1.

    References:
      Sarkar et al. 2025 (EGGROLL), https://arxiv.org/abs/2511.16652
    """
    if len(shape) < 2:
        raise ValueError(f"shape is {tuple(shape)}, expected [..., in, out].")
    check_whole("rank", rank, 1)
    key, sign = member_key(key, member, antithetic=antithetic)
    key_A, key_B = jax.random.split(key)
    *stack, D, O = shape  # noqa: E741
    A = jax.random.normal(key_A, (*stack, D, rank), jnp.float32)
    B = jax.random.normal(key_B, (*stack, O, rank), jnp.float32)
    return LowRank(A * (sign / np.float32(np.sqrt(rank))), B)


def densify(noise: Any) -> Any:
    """The same noise with a matrix in place of each `LowRank`.

    E = A Bᵀ

    Args:
      noise: a tree of arrays and `LowRank`, such as `perturbation` gives.

    Returns:
      the tree with float32 [..., D, O] where a `LowRank` was, the rest as it is.

    References:
      Sarkar et al. 2025 (EGGROLL), https://arxiv.org/abs/2511.16652
    """

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
      ValueError: a shape does not fit, x or W is not float, or σ is negative or not a
        scalar.

    References:
      Sarkar et al. 2025 (EGGROLL), https://arxiv.org/abs/2511.16652
    """
    check_rank("N T D", x=x)
    check_rank("D O", kernel=kernel)
    check_float("x", x)
    check_float("kernel", kernel)
    (N, _, D), (_, O), R = np.shape(x), np.shape(kernel), np.shape(noise.A)[-1]  # noqa: E741
    check_shape("kernel", kernel, (D, O), "the D of x")
    check_shape("noise.A", noise.A, (N, D, R), "the N and D of x")
    check_shape("noise.B", noise.B, (N, O, R), "of x, kernel and noise.A")
    check_scalars(sigma=sigma)
    check_range("sigma", sigma, 0.0, INF)
    kernel = jnp.asarray(kernel, jnp.asarray(x).dtype)
    shared = jnp.einsum("ntd,do->nto", x, kernel, preferred_element_type=jnp.float32)
    thin = jnp.einsum("ntd,ndr->ntr", float32(x), noise.A, precision=EXACT)
    own = jnp.einsum("ntr,nor->nto", thin, noise.B, precision=EXACT)
    return shared + float32(sigma) * own


def member_key(
    key: jax.Array, member: jax.Array, *, antithetic: bool
) -> tuple[jax.Array, jax.Array]:
    """The key of a member's noise, and its sign; both of a pair have the same key.

    fold_in(key, member), +1,  or of a pair fold_in(key, ⌊member / 2⌋), (−1)^member

    Args:
      key: a threefry key, of one leaf.
      member: its id, an int scalar, at least 0.
      antithetic: whether members 2k and 2k + 1 are a pair.

    Returns:
      (key, sign): a key, and a float32 scalar of ±1.

    Raises:
      ValueError: member is negative, or the key of another kind.

    References:
      Pairs: Salimans et al. 2017, section 2.1, https://arxiv.org/abs/1703.03864
    """
    check_integer("member", member)
    check_range("member", member, 0, 2**32 - 1)
    if str(jax.random.key_impl(key)) != "threefry2x32":
        # Others draw other numbers under vmap, so noise could not be made again.
        raise ValueError(f"key is {jax.random.key_impl(key)}, expected threefry2x32.")
    size = 2 if antithetic else 1
    sign = jnp.where(jnp.asarray(member) % size == 0, 1.0, jnp.float32(-1.0))
    return jax.random.fold_in(key, member // size), sign


def leaf_keys(params: Any, key: jax.Array, ranks: Any = None) -> tuple[list, Any]:
    """What the noise on each leaf is made from.

    Args:
      params: tree of float arrays or ShapeDtypeStructs; only their shapes matter.
      key: the key of all leaves.
      ranks: an int for each leaf, as the module says.

    Returns:
      (leaves, structure): key, shape and rank of each leaf, and the tree's structure.

    Raises:
      ValueError: a leaf is not float, or `ranks` has another structure, or a rank that
        its leaf cannot have.
    """
    if ranks is None:
        ranks = jax.tree.map(lambda _: FULL, params)
    check_same_structure("ranks", ranks, params)
    leaves, found = named_leaves("", params), []
    for i, (name, rank) in enumerate(named_leaves("", ranks).items()):
        check_float(f"params{name}", leaves[name])
        shape = leaves[name].shape
        if type(rank) is not int or rank < FROZEN or (rank > 0 and len(shape) < 2):
            raise ValueError(
                f"ranks{name} is {rank!r} for shape {shape}, expected FULL, FROZEN, or "
                "an int of at least 1 for a leaf [..., in, out]."
            )
        found.append((jax.random.fold_in(key, i), shape, rank))
    return found, jax.tree.structure(params)


def _leaf_noise(key, shape, rank, member, antithetic):
    if rank == FROZEN:
        return jnp.zeros(shape, jnp.float32)
    if rank != FULL:
        return low_rank_noise(key, shape, member, rank=rank, antithetic=antithetic)
    key, sign = member_key(key, member, antithetic=antithetic)
    return sign * jax.random.normal(key, shape, jnp.float32)

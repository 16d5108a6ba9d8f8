import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.losses import evolution
from rlhf_jax.losses.evolution import (
    FROZEN,
    FULL,
    LowRank,
    centered_ranks,
    densify,
    evolution_gradient,
    evolution_update,
    low_rank_matmul,
    low_rank_noise,
    perturb,
    perturbation,
    z_score,
)
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/losses/evolution.npz"
# Two stacked layers, two leaves of one shape, and one more.
PARAMS = {
    "layers": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32),
    "twins": [jax.ShapeDtypeStruct((4, 3), jnp.float32)] * 2,
    "vector": jax.ShapeDtypeStruct((3,), jnp.float32),
}
LOW_RANK = {"layers": 2, "twins": [1, FULL], "vector": FROZEN}
RANKS = {"full": None, "low_rank": LOW_RANK}

each_noise = pytest.mark.parametrize("kind", RANKS)


@pytest.fixture(scope="module")
def reference():
    """What HyperscaleES computed."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


@pytest.fixture
def key():
    return jax.random.key(7)


@pytest.fixture
def params(rng):
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), PARAMS
    )


# Compiled once for all tests, and without the optimisation that takes most of the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnames=("kind", "antithetic"))
def noise_of(key, member, kind="full", antithetic=True):
    """The leaves of the noise on `PARAMS`, as matrices."""
    noise = perturbation(PARAMS, key, member, antithetic=antithetic, ranks=RANKS[kind])
    return jax.tree.leaves(densify(noise))


def eager_gradient_of(key, members, fitness, kind="full", antithetic=True, sigma=0.5):
    """Of a population of 8 on `PARAMS`."""
    return evolution_gradient(
        PARAMS,
        key,
        members,
        fitness,
        sigma=sigma,
        population_size=8,
        antithetic=antithetic,
        ranks=RANKS[kind],
    )


gradient_of = jit(eager_gradient_of, static_argnames=("kind", "antithetic"))


def assert_trees(compare, got, expected):
    """`compare` each leaf of the one with that of the other."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        compare(x, y)


equal = functools.partial(assert_trees, np.testing.assert_array_equal)
close = functools.partial(
    assert_trees, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
)


# noise


@each_noise
def test_noise_is_a_function_of_key_and_member(params, key, kind):
    make = functools.partial(perturbation, antithetic=True, ranks=RANKS[kind])
    expected = jit(functools.partial(make, PARAMS))(key, 5)
    for x in jax.tree.leaves(expected):
        assert x.dtype == jnp.float32
    # of arrays, whose values and dtype matter nothing
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    equal(jit(make)(halves, key, 5), expected)
    # not compiled, with another type of id, and as one of many
    close(make(PARAMS, key, np.uint32(5)), expected)
    many = jit(jax.vmap(functools.partial(make, PARAMS, key)))(jnp.arange(4, 8))
    close(jax.tree.map(lambda x: x[1], many), expected)


@each_noise
def test_no_two_of_anything_share_their_noise(key, kind):
    """Members that are no pair, iterations, leaves of one shape, layers of a stack."""
    numbers = []
    for iteration, member in itertools.product((0, 1), (0, 2, 4)):
        *noise, vector = noise_of(jax.random.fold_in(key, iteration), member, kind)
        if RANKS[kind]:
            assert not vector.any()
        numbers.extend(np.concatenate([np.ravel(x) for x in noise]))
    assert len(set(np.abs(numbers))) == len(numbers)


@each_noise
def test_an_antithetic_pair_cancels(key, kind):
    for even in (0, 6):
        for plus, minus in zip(
            noise_of(key, even, kind), noise_of(key, even + 1, kind), strict=True
        ):
            np.testing.assert_array_equal(plus, -minus)
    plus, minus = (noise_of(key, i, kind, antithetic=False)[0] for i in (0, 1))
    assert not np.allclose(plus, -minus, atol=0.01)


def test_full_noise_is_standard_normal(key):
    n = 40_000
    params = [jax.ShapeDtypeStruct((n,), jnp.float32)]
    (noise,) = perturbation(params, key, 3, antithetic=True)
    # five standard deviations of a mean of n, and of a mean of n squares (variance 2)
    assert abs(noise.mean()) < 5 / np.sqrt(n)
    assert abs((noise**2).mean() - 1) < 5 * np.sqrt(2 / n)


@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_noise_has_unit_variance(key, rank):
    """E[E] = 0 and E[E²] = 1.

    E is a sum of R products of normals over √R, so E[E⁴] = 3 + 6/R and E² has the
    variance 2 + 6/R. A mean over the entries of a matrix, however they depend on each
    other, has no larger one, and the N matrices are independent: five deviations are
    5 √((2 + 6/R) / N).
    """
    N = 4000
    make = functools.partial(low_rank_noise, key, (6, 5), rank=rank, antithetic=False)
    E = np.asarray(densify(jit(jax.vmap(make))(np.arange(N))))
    assert E.shape == (N, 6, 5)
    assert abs(E.mean()) < 5 / np.sqrt(N)
    assert abs((E**2).mean() - 1) < 5 * np.sqrt((2 + 6 / rank) / N)
    assert np.linalg.matrix_rank(E[0]) == min(rank, 5)


def test_stacked_matrices_equal_a_loop_over_the_layers(key):
    noise = low_rank_noise(key, (2, 3, 4), 1, rank=2, antithetic=True)
    got = densify({"kernel": noise, "bias": np.ones(3)})
    np.testing.assert_array_equal(got["bias"], np.ones(3))
    expected = np.zeros((2, 3, 4))
    for layer, i, j, r in np.ndindex(2, 3, 4, 2):
        expected[layer, i, j] += float(noise.A[layer, i, r]) * noise.B[layer, j, r]
    np.testing.assert_allclose(got["kernel"], expected, rtol=1e-5, atol=1e-6)


# perturbed weights


@each_noise
def test_perturbed_weights_are_the_weights_and_the_noise(params, key, kind):
    before = jax.tree.map(np.array, params)
    function = functools.partial(perturb, sigma=0.3, antithetic=True, ranks=RANKS[kind])
    expected = [
        theta + 0.3 * np.asarray(epsilon, np.float64)
        for theta, epsilon in zip(
            jax.tree.leaves(before), noise_of(key, 2, kind), strict=True
        )
    ]
    got = function(params, key, 2)
    close(got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    equal(params, before)
    close(jit(function)(params, key, 2), got)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sigma_zero_is_the_weights_bit_for_bit(params, key, dtype):
    params = jax.tree.map(
        lambda x: jnp.concatenate([x[..., 1:], -jnp.zeros_like(x[..., :1])], -1), params
    )
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    function = functools.partial(perturb, antithetic=True, ranks=LOW_RANK)
    at_sigma = jit(lambda sigma: function(params, key, 3, sigma=sigma))
    for x, y in zip(
        jax.tree.leaves(at_sigma(0.0)), jax.tree.leaves(params), strict=True
    ):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    # and a frozen leaf whatever σ is
    got = at_sigma(1.0)["vector"]
    assert np.asarray(got).tobytes() == np.asarray(params["vector"]).tobytes()


def test_bfloat16_weights_are_added_to_in_float32(key):
    # neither the noise nor σ is rounded before the sum is
    theta = jnp.ones(4000, jnp.bfloat16)
    (got,) = perturb([theta], key, 0, sigma=0.01, antithetic=False)
    (noise,) = perturbation([theta], key, 0, antithetic=False)
    assert got.dtype == jnp.bfloat16
    expected = (1 + np.float32(0.01) * np.asarray(noise)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, expected)


# a layer of the whole population


def random_layer(rng, N=4, T=3, D=5, O=6, R=2):  # noqa: E741
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    noise = LowRank(normal(N, D, R), normal(N, O, R))
    return normal(N, T, D), normal(D, O), noise


def test_low_rank_matmul_worked_by_hand():
    # W = I, E = (1, 2)ᵀ (3, -1) = [[3, -1], [6, -2]], σ = 1/2, x = (1, 1):
    # x W = (1, 1) and x E = (9, -3), so y = (1 + 4.5, 1 - 1.5)
    noise = LowRank(np.array([[[1.0], [2.0]]]), np.array([[[3.0], [-1.0]]]))
    got = low_rank_matmul(np.ones((1, 1, 2)), np.eye(2), noise, sigma=0.5)
    np.testing.assert_array_equal(got, [[[5.5, -0.5]]])


def test_low_rank_matmul_equals_the_perturbed_kernels(rng):
    x, kernel, noise = random_layer(rng)
    got = jax.jit(functools.partial(low_rank_matmul, sigma=0.2))(x, kernel, noise)
    dense = np.asarray(densify(noise), np.float64)
    for n in range(4):
        expected = x[n] @ (kernel + 0.2 * dense[n])
        np.testing.assert_allclose(got[n], expected, rtol=1e-5, atol=1e-5)


def test_low_rank_matmul_equals_hyperscale_es(reference):
    noise = LowRank(reference["A"], reference["B"])
    got = low_rank_matmul(
        reference["x"], reference["kernel"], noise, sigma=float(reference["sigma"])
    )
    np.testing.assert_allclose(got, reference["outputs"], rtol=1e-5, atol=1e-6)


def test_low_rank_matmul_in_bfloat16_sums_in_float32(rng):
    x, kernel, noise = random_layer(rng)
    function = functools.partial(low_rank_matmul, noise=noise, sigma=0.2)
    invariants.assert_bfloat16_gives_float32(function, [x, kernel])
    invariants.assert_jit_equals_eager(function, x, kernel)


def test_low_rank_matmul_rounds_a_float32_kernel_to_the_dtype_of_x(rng):
    x, kernel, noise = random_layer(rng)
    x = jnp.asarray(x, jnp.bfloat16)
    got = low_rank_matmul(x, kernel, noise, sigma=0.2)
    rounded = jnp.asarray(kernel, jnp.bfloat16)
    expected = low_rank_matmul(x, rounded, noise, sigma=0.2)
    np.testing.assert_array_equal(got, expected)


def test_low_rank_matmul_of_a_wrong_shape_raises(rng):
    x, kernel, (A, B) = random_layer(rng)
    for changes, message in (
        ({"x": x[0]}, r"x has shape \(3, 5\), expected \[N, T, D\]"),
        ({"kernel": kernel.T}, r"kernel has shape \(6, 5\), expected \(5, 5\)"),
        ({"noise": LowRank(A[:3], B)}, r"noise.A has shape \(3, 5, 2\), expected \(4,"),
        ({"noise": LowRank(A, A)}, r"noise.B has shape \(4, 5, 2\), expected \(4, 6"),
        ({"noise": LowRank(B, A)}, r"noise.A has shape \(4, 6, 2\), expected \(4, 5"),
        ({"sigma": -0.1}, r"sigma is -0.1, expected"),
    ):
        arguments = {"x": x, "kernel": kernel, "noise": LowRank(A, B), "sigma": 0.1}
        with pytest.raises(ValueError, match=message):
            low_rank_matmul(**(arguments | changes))


# fitness


def random_fitness(rng, N=12):
    return rng.normal(size=N).astype(np.float32), rng.random(N) < 0.7


def test_z_score_worked_by_hand():
    # mean 4, deviations -3, 1, 2 of squares 9 + 1 + 4 = 14, s = √(14/3) = 2.1602469
    fitness, mask = np.array([1.0, np.nan, 5.0, 6.0]), np.array([1, 0, 1, 1], bool)
    got = z_score(fitness, mask)
    np.testing.assert_allclose(got, [-1.3887301, 0.0, 0.4629100, 0.9258201], rtol=1e-6)
    # groups (1, 3) and (5, 7) have the means 2 and 6; all have the mean 4 and the
    # variance (9 + 1 + 1 + 9) / 4 = 5: ±1/√5 = ±0.4472136
    got = z_score(np.array([1.0, 3.0, 5.0, 7.0]), group_size=2)
    np.testing.assert_allclose(got, 0.4472136 * np.array([-1, 1, -1, 1]), rtol=1e-6)


@pytest.mark.parametrize("group_size", [None, 4])
def test_z_score_equals_a_loop(rng, group_size):
    fitness, mask = random_fitness(rng)
    mask[4:8] = False  # a prompt without a score
    real = [float(x) for x in fitness[mask]]
    variance = sum((x - sum(real) / len(real)) ** 2 for x in real) / len(real)
    size, expected = group_size or 12, np.zeros(12)
    for i in np.flatnonzero(mask):
        start = i - i % size
        group = [float(fitness[j]) for j in range(start, start + size) if mask[j]]
        expected[i] = (fitness[i] - sum(group) / len(group)) / np.sqrt(variance + 0.5)
    got = z_score(fitness, mask, group_size=group_size, eps=0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_z_score_equals_hyperscale_es(reference):
    raw, size = reference["raw"], int(reference["group_size"])
    got = z_score(raw, eps=1e-5)
    np.testing.assert_allclose(got, reference["plain"], rtol=1e-5, atol=1e-6)
    got = z_score(raw, group_size=size, eps=1e-5)
    np.testing.assert_allclose(got, reference["grouped"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, -3e4, 0.0])
def test_equal_fitness_moves_nothing(value):
    """30 times 0.1 has a float32 mean that is not 0.1; over √ε that is a step."""
    fitness = np.full(30, value, np.float32)
    for function in (z_score, functools.partial(z_score, group_size=3), centered_ranks):
        np.testing.assert_array_equal(function(fitness), np.zeros(30))


def test_centered_ranks_worked_by_hand():
    # ranks 3, 0, (1 + 2)/2 twice of four, over 3 and less 1/2
    got = centered_ranks(np.array([9.0, -5.0, 0.1, 0.1]))
    np.testing.assert_allclose(got, [0.5, -0.5, 0.0, 0.0], atol=1e-7)
    # the third was not scored: ranks 1 and 0 of two
    mask = np.array([True, True, False])
    np.testing.assert_array_equal(
        centered_ranks(np.array([9.0, -5.0, np.nan]), mask), [0.5, -0.5, 0.0]
    )
    np.testing.assert_array_equal(centered_ranks(np.array([3.0])), [0.0])


def test_centered_ranks_equal_scipys(rng):
    fitness = rng.integers(0, 6, 20).astype(np.float32)  # many ties
    fitness[:2] = np.inf, -np.inf
    mask = rng.random(20) < 0.8
    mask[:2] = True
    expected = np.zeros(20)
    n = mask.sum()
    ranks = scipy.stats.rankdata(fitness[mask], method="average")
    expected[mask] = (ranks - 1) / (n - 1) - 0.5
    np.testing.assert_allclose(centered_ranks(fitness, mask), expected, atol=1e-6)


def test_centered_ranks_see_the_order_alone_and_no_nan_wins(rng):
    fitness, mask = random_fitness(rng)
    plain = centered_ranks(fitness, mask)
    np.testing.assert_array_equal(centered_ranks(np.exp(fitness) * 9, mask), plain)
    np.testing.assert_array_equal(centered_ranks(-fitness, mask), -plain)
    np.testing.assert_allclose(plain.sum(), 0.0, atol=1e-6)
    fitness[3] = np.nan
    assert np.isnan(centered_ranks(fitness)[3])


@pytest.mark.parametrize(
    "function",
    [z_score, functools.partial(z_score, group_size=3), centered_ranks],
    ids=["z_score", "groups", "ranks"],
)
def test_fitness_functions_ignore_padding(rng, function):
    fitness, mask = random_fitness(rng)
    invariants.assert_wrong_shapes_raise(function, [fitness, mask], ["fitness", "mask"])
    np.testing.assert_array_equal(function(fitness, np.zeros(12, bool)), np.zeros(12))


@pytest.mark.parametrize("function", [z_score, centered_ranks])
def test_fitness_has_no_gradient(rng, function):
    fitness, mask = random_fitness(rng)
    weights = np.arange(12, dtype=np.float32)
    gradient = jax.grad(lambda x: (weights * function(x, mask)).sum())(fitness)
    np.testing.assert_array_equal(gradient, np.zeros(12))


def test_z_score_ignores_the_order_of_members(rng):
    fitness, mask = random_fitness(rng)
    order = rng.permutation(12)
    np.testing.assert_allclose(
        z_score(fitness[order], mask[order]),
        z_score(fitness, mask)[order],
        rtol=1e-5,
        atol=1e-6,
    )


def test_group_size_that_does_not_divide_raises(rng):
    fitness, _ = random_fitness(rng)
    for size in (5, 0):
        with pytest.raises(ValueError, match=f"group_size is {size}, expected a div"):
            z_score(fitness, group_size=size)
    with pytest.raises(ValueError, match=r"fitness has shape \(3, 4\), expected \[N\]"):
        z_score(fitness.reshape(3, 4))


# the gradient


def test_gradient_worked_by_hand(key):
    # a pair of fitness 12 and 4, σ = 1/2 and N = 8: (12 ε - 4 ε) / 4 = 2 ε
    members, fitness = jnp.array([2, 3, 0, 0]), jnp.array([12.0, 4.0, 0.0, 0.0])
    got = gradient_of(key, members, fitness)
    close(got, [2 * x for x in noise_of(key, 2)])
    assert jax.tree.structure(got) == jax.tree.structure(PARAMS)


@each_noise
@pytest.mark.parametrize("antithetic", [True, False])
def test_gradient_equals_a_loop(key, rng, kind, antithetic):
    members = np.array([4, 1, 7, 0])
    fitness = rng.normal(size=4).astype(np.float32)
    expected = [np.zeros(x.shape) for x in jax.tree.leaves(PARAMS)]
    for member, f in zip(members.tolist(), fitness.tolist(), strict=True):
        noise = noise_of(key, member, kind, antithetic)
        for total, epsilon in zip(expected, noise, strict=True):
            total += f * np.asarray(epsilon) / (8 * 0.5)
    close(gradient_of(key, members, fitness, kind, antithetic), expected)


def test_gradient_is_float32_compiled_or_not(key, rng):
    fitness, members = jnp.asarray(rng.normal(size=4), jnp.bfloat16), np.arange(4)
    got = eager_gradient_of(key, members, fitness, "low_rank")
    for x in jax.tree.leaves(got):
        assert x.dtype == jnp.float32
    close(got, gradient_of(key, members, np.float32(fitness), "low_rank"))


def test_no_members_sum_to_zero(key):
    for x in jax.tree.leaves(gradient_of(key, np.arange(0), np.ones(0), "low_rank")):
        np.testing.assert_array_equal(x, np.zeros(x.shape))


def test_low_rank_gradient_equals_hyperscale_es(reference, key, monkeypatch):
    """Theirs is -√N times a mean over members of σ² times what ours divides by σ²."""
    monkeypatch.setattr(
        evolution,
        "low_rank_noise",
        lambda key, shape, member, **_: LowRank(
            jnp.asarray(reference["A"])[member], jnp.asarray(reference["B"])[member]
        ),
    )
    sigma, N = float(reference["sigma"]), len(reference["plain"])
    (got,) = evolution_gradient(
        [reference["kernel"]],
        key,
        np.arange(N),
        reference["plain"],
        sigma=sigma,
        population_size=N,
        antithetic=True,
        ranks=[3],
    )
    np.testing.assert_allclose(
        -np.sqrt(N) * sigma**2 * got, reference["update"], rtol=1e-5, atol=1e-7
    )


@each_noise
def test_parts_of_the_population_sum_to_the_whole(key, rng, kind):
    fitness, members = rng.normal(size=8).astype(np.float32), np.arange(8)
    whole = gradient_of(key, members, fitness, kind)
    order = rng.permutation(8)
    close(gradient_of(key, members[order], fitness[order], kind), whole)
    parts = [
        gradient_of(key, members[part], fitness[part], kind)
        for part in (order[:4], order[4:])
    ]
    close(jax.tree.map(lambda x, y: x + y, *parts), whole)
    # the even members alone, with the difference of their pair
    pairs = gradient_of(key, members[::2], fitness[::2] - fitness[1::2], kind)
    close(pairs, whole)


@each_noise
def test_devices_sum_their_own_members(key, rng, kind):
    mesh = jax.make_mesh(
        (4,), ("population",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    split, whole = jax.P("population"), jax.P()

    def of_device(key, members, fitness):
        part = eager_gradient_of(key, members, fitness, kind)
        return jax.lax.psum(part, "population")

    on_mesh = jax.shard_map(
        of_device, mesh=mesh, in_specs=(whole, split, split), out_specs=whole
    )
    fitness, members = rng.normal(size=8).astype(np.float32), np.arange(8)
    got = jit(on_mesh)(key, members, fitness)
    close(got, gradient_of(key, members, fitness, kind))


def test_no_more_than_one_perturbation_is_in_memory(key):
    shape = jax.ShapeDtypeStruct((100, 1000), jnp.float32)
    function = functools.partial(
        evolution_gradient, [shape], key, sigma=1.0, population_size=64, antithetic=True
    )
    arguments = np.arange(64), np.ones(64, np.float32)
    compiled = jax.jit(function).lower(*arguments).compile()
    # the sum, the noise and its random bits on the way, not 64 of them
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * 100 * 1000


def ascent_error(params, slopes, key, ranks, pairs):
    """|ĝ - c|² / |c|² where fitness is c · θ, by evaluating every member."""
    N, sigma = 2 * pairs, 0.1
    members = np.arange(N)

    def score(member):
        moved = perturb(params, key, member, sigma=sigma, antithetic=True, ranks=ranks)
        return sum(
            (c * theta).sum()
            for c, theta in zip(slopes, jax.tree.leaves(moved), strict=True)
        )

    fitness = jit(jax.vmap(score))(members)
    function = functools.partial(
        evolution_gradient, sigma=sigma, population_size=N, antithetic=True, ranks=ranks
    )
    got = jit(function)(params, key, members, fitness)
    differences = [
        np.square(g - c).sum()
        for g, c in zip(jax.tree.leaves(got), slopes, strict=True)
    ]
    return sum(differences) / sum(np.square(c).sum() for c in slopes)


def test_gradient_of_a_linear_fitness_is_its_slope(key, rng):
    """Within 1.5 times the root of the expected squared error, by a fixed seed.

    A pair adds (c · ε) ε, in which c · θ cancels, of mean c. For normal ε coordinate j
    has the variance |c|² + cⱼ², summed over d of them |c|² (d + 1), over K pairs
    |c|² (d + 1) / K.
    """
    params = [jnp.ones((3, 4)), jnp.ones(8)]
    slopes = [rng.normal(size=x.shape).astype(np.float32) for x in params]
    error = ascent_error(params, slopes, key, None, pairs=2048)
    assert error < 1.5**2 * (20 + 1) / 2048


def test_low_rank_gradient_of_a_linear_fitness_is_its_slope(key, rng):
    """As above, for E = a bᵀ and fitness Σ C E = aᵀ C b.

    E[(aᵀ C b)² aᵢ² bⱼ²] = |C|² + 2 |C row i|² + 2 |C column j|² + 4 Cᵢⱼ² by the fourth
    moments of a and b. Summed over D × O entries, less |C|² for the mean, that is
    |C|² (D O + 2 O + 2 D + 4 - 1) = |C|² ((D + 2) (O + 2) - 1).
    """
    params, slopes = [jnp.ones((3, 4))], [rng.normal(size=(3, 4)).astype(np.float32)]
    error = ascent_error(params, slopes, key, [1], pairs=2048)
    assert error < 1.5**2 * (5 * 6 - 1) / 2048


def test_update_worked_by_hand_and_es_at_scale(params, key, rng):
    # 2 + 0.5 · (-3)
    got = evolution_update([jnp.float32(2.0)], [jnp.float32(-3.0)], lr=0.5)
    assert got == [0.5]
    # θ + α/N Σ Z ε
    fitness, alpha = rng.normal(size=8).astype(np.float32), 0.01
    Z = (fitness - fitness.mean()) / (fitness.std() + 1e-8)
    expected = [np.array(x, np.float64) for x in jax.tree.leaves(params)]
    for member in range(8):
        for theta, epsilon in zip(expected, noise_of(key, member), strict=True):
            theta += alpha / 8 * Z[member] * np.asarray(epsilon)
    gradient = gradient_of(key, np.arange(8), z_score(fitness), sigma=1.0)
    close(evolution_update(params, gradient, lr=alpha), expected)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = jax.jit(evolution_update)(halves, gradient, lr=alpha)
    for x in jax.tree.leaves(got):
        assert x.dtype == jnp.bfloat16


# errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": np.ones((2, 4), int)}, r"members has shape \(2, 4\), expected"),
        ({"fitness": np.ones(7)}, r"fitness has shape \(7,\), expected \(8,\)"),
        ({"sigma": 0.0}, "sigma is 0.0, expected"),
        ({"population_size": 0}, "population_size is 0, expected"),
        ({"ranks": {"layers": 1}}, "ranks is .* expected the tree of params"),
    ],
)
def test_gradient_with_bad_arguments_raises(key, changes, message):
    arguments = {"members": np.arange(8), "fitness": np.ones(8), "sigma": 1.0}
    arguments |= {"population_size": 8, "antithetic": True}
    with pytest.raises(ValueError, match=message):
        evolution_gradient(PARAMS, key, **(arguments | changes))


def test_noise_with_bad_arguments_raises(key):
    make = functools.partial(perturbation, antithetic=True)
    with pytest.raises(ValueError, match=r"params\['step'\] is int32, expected a flo"):
        make({"step": jnp.zeros((), jnp.int32)}, key, 0)
    # a vector has no rank, and True is not one
    for shape, rank in (((3,), 1), ((3, 3), -2), ((3, 3), 1.0), ((3, 3), True)):
        message = rf"ranks\['w'\] is {rank} for shape {re.escape(str(shape))}, expected"
        with pytest.raises(ValueError, match=message):
            make({"w": jnp.zeros(shape)}, key, 0, ranks={"w": rank})
    with pytest.raises(ValueError, match="key is rbg, expected threefry2x32"):
        make(PARAMS, jax.random.key(0, impl="rbg"), 0)
    with pytest.raises(ValueError, match="member is -1, expected"):
        make(PARAMS, key, -1)
    with pytest.raises(ValueError, match=r"sigma is -1\.0, expected"):
        perturb(PARAMS, key, 0, sigma=-1.0, antithetic=True)
    with pytest.raises(
        ValueError, match=r"shape is \(3,\), expected \[\.\.\., in, out"
    ):
        low_rank_noise(key, (3,), 0, rank=1, antithetic=True)
    with pytest.raises(ValueError, match="rank is 0, expected"):
        low_rank_noise(key, (3, 3), 0, rank=0, antithetic=True)

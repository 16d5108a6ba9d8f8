import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.perturbations import (
    FULL,
    LowRank,
    densify,
    low_rank_matmul,
    low_rank_noise,
    perturb,
    perturbation,
)
from tests.losses import invariants
from tests.losses.population import (
    PARAMS,
    RANKS,
    close,
    equal,
    jit,
    noise_of,
    random_params,
)

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures/losses/evolution.npz"


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
    return random_params(rng)


# noise


def test_noise_is_a_function_of_key_and_member(params, key):
    expected = noise_of(key, 5)
    # as one of many
    make = functools.partial(perturbation, PARAMS, key, antithetic=True, ranks=RANKS)
    many = jax.device_get(jit(jax.vmap(make))(np.arange(4, 8)))
    for x in jax.tree.leaves(many):
        assert x.dtype == np.float32
    close(densify(jax.tree.map(lambda x: x[1], many)), expected)
    # not compiled, with another type of id, and of an array, whose values and dtype
    # matter nothing: the first leaf, alone
    leaf = params["layers"].astype(jnp.bfloat16)
    got = perturbation([leaf], key, np.uint32(5), antithetic=True, ranks=[2])
    close(densify(got), expected[0])


def test_no_ranks_are_full_noise_everywhere(key):
    full = jax.tree.map(lambda _: FULL, PARAMS)

    @jit
    def both(key):
        make = functools.partial(perturbation, PARAMS, key, 3, antithetic=True)
        return make(), make(ranks=full)

    got, expected = both(key)
    equal(got, expected)
    for x, theta in zip(jax.tree.leaves(got), jax.tree.leaves(PARAMS), strict=True):
        assert x.shape == theta.shape
        assert x.all()


def test_no_two_of_anything_share_their_noise(key):
    """Members that are no pair, iterations, leaves of one shape, layers of a stack."""
    numbers = []
    for iteration, member in itertools.product((0, 1), (0, 2, 4)):
        *noise, vector = noise_of(jax.random.fold_in(key, iteration), member)
        assert not vector.any()
        numbers.extend(np.concatenate([np.ravel(x) for x in noise]))
    assert len(set(np.abs(numbers))) == len(numbers)


def test_an_antithetic_pair_cancels(key):
    for even in (0, 6):
        for plus, minus in zip(
            noise_of(key, even), noise_of(key, even + 1), strict=True
        ):
            np.testing.assert_array_equal(plus, -minus)
    plus, minus = (noise_of(key, i, antithetic=False)[0] for i in (0, 1))
    assert not np.allclose(plus, -minus, atol=0.01)


def test_full_noise_is_standard_normal(key):
    n = 40_000
    params = [jax.ShapeDtypeStruct((n,), jnp.float32)]
    make = jit(functools.partial(perturbation, params, antithetic=True))
    (noise,) = make(key, 3)
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


def test_perturbed_weights_are_the_weights_and_the_noise(params, key):
    before = jax.tree.map(np.array, params)
    function = functools.partial(perturb, sigma=0.3, antithetic=True, ranks=RANKS)
    expected = [
        theta + 0.3 * np.asarray(epsilon, np.float64)
        for theta, epsilon in zip(
            jax.tree.leaves(before), noise_of(key, 2), strict=True
        )
    ]
    got = jit(function)(params, key, 2)
    close(got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    # and not compiled; neither changes the weights it was given
    alone = perturb([params["layers"]], key, 2, sigma=0.3, antithetic=True, ranks=[2])
    close(alone, got["layers"])
    equal(params, before)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sigma_zero_is_the_weights_bit_for_bit(params, key, dtype):
    # with a negative zero among them
    params = jax.tree.map(
        lambda x: np.append(x[..., 1:], -np.zeros_like(x[..., :1]), -1).astype(dtype),
        params,
    )
    function = functools.partial(perturb, antithetic=True, ranks=RANKS)
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
    (got,) = jit(functools.partial(perturb, sigma=0.01, antithetic=False))(
        [theta], key, 0
    )
    (noise,) = jit(functools.partial(perturbation, antithetic=False))([theta], key, 0)
    assert got.dtype == jnp.bfloat16
    expected = (1 + np.float32(0.01) * np.asarray(noise)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, expected)


# a layer of the whole population


compiled_matmul = jit(low_rank_matmul)


def random_layer(rng, N=4, T=3, D=5, O=6, R=2):  # noqa: E741
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    noise = LowRank(normal(N, D, R), normal(N, O, R))
    return normal(N, T, D), normal(D, O), noise


def test_low_rank_matmul_worked_by_hand():
    # W = I, E = (1, 2)ᵀ (3, -1) = [[3, -1], [6, -2]], σ = 1/2, x = (1, 1):
    # x W = (1, 1) and x E = (9, -3), so y = (1 + 4.5, 1 - 1.5)
    noise = LowRank(np.array([[[1.0], [2.0]]]), np.array([[[3.0], [-1.0]]]))
    got = compiled_matmul(np.ones((1, 1, 2)), np.eye(2), noise, sigma=0.5)
    np.testing.assert_array_equal(got, [[[5.5, -0.5]]])


def test_low_rank_matmul_equals_the_perturbed_kernels(rng):
    x, kernel, noise = random_layer(rng)
    got = compiled_matmul(x, kernel, noise, sigma=0.2)
    dense = np.asarray(densify(noise), np.float64)
    for n in range(4):
        expected = x[n] @ (kernel + 0.2 * dense[n])
        np.testing.assert_allclose(got[n], expected, rtol=1e-5, atol=1e-5)


def test_low_rank_matmul_equals_hyperscale_es(reference):
    noise = LowRank(reference["A"], reference["B"])
    got = compiled_matmul(
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
    got = compiled_matmul(x, kernel, noise, sigma=0.2)
    rounded = jnp.asarray(kernel, jnp.bfloat16)
    expected = compiled_matmul(x, rounded, noise, sigma=0.2)
    np.testing.assert_array_equal(got, expected)


def test_low_rank_matmul_with_bad_arguments_raises(rng):
    x, kernel, (A, B) = random_layer(rng)
    for changes, message in (
        ({"x": x[0]}, r"x has shape \(3, 5\), expected \[N, T, D\]"),
        ({"kernel": kernel.T}, r"kernel has shape \(6, 5\), expected \(5, 5\)"),
        ({"noise": LowRank(A[:3], B)}, r"noise.A has shape \(3, 5, 2\), expected \(4,"),
        ({"noise": LowRank(A, A)}, r"noise.B has shape \(4, 5, 2\), expected \(4, 6"),
        ({"noise": LowRank(B, A)}, r"noise.A has shape \(4, 6, 2\), expected \(4, 5"),
        ({"sigma": -0.1}, r"sigma is -0.1, expected"),
        ({"sigma": np.ones(4)}, r"sigma has shape \(4,\), expected \(\), a scalar"),
        # an integer x would truncate the kernel
        ({"x": np.ones((4, 3, 5), int)}, r"^x is int64, expected a float dtype"),
        ({"kernel": np.ones((5, 6), int)}, r"^kernel is int64, expected a float dtype"),
    ):
        arguments = {"x": x, "kernel": kernel, "noise": LowRank(A, B), "sigma": 0.1}
        with pytest.raises(ValueError, match=message):
            low_rank_matmul(**(arguments | changes))


# errors


def test_noise_with_bad_arguments_raises(key):
    make = functools.partial(perturbation, antithetic=True)
    with pytest.raises(ValueError, match=r"params\['step'\] is int32, expected a flo"):
        make({"step": jnp.zeros((), jnp.int32)}, key, 0)
    with pytest.raises(
        ValueError, match=r"params\['b'\] is a Python float, expected a"
    ):
        make({"b": 1.0}, key, 0)
    # a vector has no rank, and True is not one
    for shape, rank in (((3,), 1), ((3, 3), -2), ((3, 3), True), ((3, 3), "1")):
        message = (
            rf"ranks\['w'\] is {rank!r} for shape {re.escape(str(shape))}, expected"
        )
        with pytest.raises(ValueError, match=message):
            make({"w": jnp.zeros(shape)}, key, 0, ranks={"w": rank})
    for ranks, message in (
        ({"w": 1}, r"ranks lacks \['b'\], expected the structure of params\."),
        ({"b": 1, "v": 1, "w": 1}, r"ranks has \['v'\], expected the str"),
        ({"b": 1, "v": 1}, r"ranks lacks \['w'\] and has \['v'\], expected the str"),
    ):
        with pytest.raises(ValueError, match=message):
            make({"b": jnp.zeros(3), "w": jnp.zeros((3, 3))}, key, 0, ranks=ranks)
    with pytest.raises(ValueError, match=r"ranks is .*\(\*,\).*, expected .*\[\*\]"):
        make([jnp.zeros(3)], key, 0, ranks=(0,))
    with pytest.raises(ValueError, match="key is rbg, expected threefry2x32"):
        make(PARAMS, jax.random.key(0, impl="rbg"), 0)
    with pytest.raises(ValueError, match="member is -1, expected"):
        make(PARAMS, key, -1)
    with pytest.raises(ValueError, match=r"sigma is -1\.0, expected"):
        perturb(PARAMS, key, 0, sigma=-1.0, antithetic=True)
    with pytest.raises(
        ValueError, match=r"sigma has shape \(3,\), expected \(\), a sc"
    ):
        perturb(PARAMS, key, 0, sigma=np.ones(3), antithetic=True)
    with pytest.raises(
        ValueError, match=r"shape is \(3,\), expected \[\.\.\., in, out"
    ):
        low_rank_noise(key, (3,), 0, rank=1, antithetic=True)
    with pytest.raises(ValueError, match="rank is 0, expected"):
        low_rank_noise(key, (3, 3), 0, rank=0, antithetic=True)

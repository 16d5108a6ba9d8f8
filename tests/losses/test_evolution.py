import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import evolution
from rlhf_jax.losses.evolution import evolution_gradient, evolution_update
from rlhf_jax.losses.fitness import z_score
from rlhf_jax.losses.perturbations import LowRank, perturb
from tests.losses.population import PARAMS, RANKS, close, jit, noise_of, random_params

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


def eager_gradient_of(key, members, fitness, antithetic, sigma):
    """Of a population of 8 on `PARAMS`."""
    return evolution_gradient(
        PARAMS,
        key,
        members,
        fitness,
        sigma=sigma,
        population_size=8,
        antithetic=antithetic,
        ranks=RANKS,
    )


compiled_gradient_of = jit(eager_gradient_of, static_argnums=3)


def gradient_of(key, members, fitness, antithetic=True, sigma=0.5):
    """As numpy; compiled once for four members: one type and all by position."""
    arrays = np.asarray(members, np.int32), np.asarray(fitness, np.float32)
    gradient = compiled_gradient_of(key, *arrays, antithetic, np.float32(sigma))
    return jax.device_get(gradient)


# the gradient


def test_gradient_worked_by_hand(key):
    # a pair of fitness 12 and 4, σ = 1/2 and N = 8: (12 ε - 4 ε) / 4 = 2 ε
    members, fitness = [2, 3, 0, 0], [12.0, 4.0, 0.0, 0.0]
    got = gradient_of(key, members, fitness)
    close(got, [2 * x for x in noise_of(key, 2)])
    assert jax.tree.structure(got) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("antithetic", [True, False])
def test_gradient_equals_a_loop(key, rng, antithetic):
    members = np.array([4, 1, 7, 0])
    fitness = rng.normal(size=4).astype(np.float32)
    expected = [np.zeros(x.shape) for x in jax.tree.leaves(PARAMS)]
    for member, f in zip(members.tolist(), fitness.tolist(), strict=True):
        noise = noise_of(key, member, antithetic)
        for total, epsilon in zip(expected, noise, strict=True):
            total += f * np.asarray(epsilon) / (8 * 0.5)
    close(gradient_of(key, members, fitness, antithetic), expected)


def test_gradient_is_float32_compiled_or_not(key, rng):
    function = functools.partial(
        evolution_gradient,
        [PARAMS["vector"]],
        population_size=6,
        antithetic=True,
    )
    fitness, sigma = jnp.asarray(rng.normal(size=4), jnp.bfloat16), jnp.bfloat16(0.7)
    (got,) = function(key, np.arange(4), fitness, sigma=sigma)
    assert got.dtype == jnp.float32
    # 6 σ has more digits than bfloat16
    expected = jit(function)(
        key, np.arange(4), np.float32(fitness), sigma=np.float32(sigma)
    )
    close(got, expected)


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


def test_parts_of_the_population_sum_to_the_whole(key, rng):
    fitness, members = rng.normal(size=4).astype(np.float32), np.array([2, 3, 6, 7])
    whole = gradient_of(key, members, fitness)
    order = rng.permutation(4)
    close(gradient_of(key, members[order], fitness[order]), whole)
    parts = [
        gradient_of(key, members, np.where(part, fitness, 0.0))
        for part in (members < 4, members > 4)
    ]
    close(jax.tree.map(np.add, *parts), whole)
    # the even members alone, with the difference of their pair
    differences = np.append(fitness[::2] - fitness[1::2], [0.0, 0.0])
    close(gradient_of(key, members[[0, 2, 0, 0]], differences), whole)


def test_devices_sum_their_own_members(key, rng):
    mesh = jax.make_mesh(
        (4,), ("population",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    split, whole = jax.P("population"), jax.P()

    def of_device(key, members, fitness):
        part = eager_gradient_of(key, members, fitness, True, 0.5)
        return jax.lax.psum(part, "population")

    on_mesh = jax.shard_map(
        of_device, mesh=mesh, in_specs=(whole, split, split), out_specs=whole
    )
    fitness, members = rng.normal(size=4).astype(np.float32), np.array([4, 1, 7, 0])
    got = jit(on_mesh)(key, members, fitness)
    close(got, gradient_of(key, members, fitness))


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


def test_update_worked_by_hand():
    # 2 + 0.5 · (-3)
    assert evolution_update([np.float32(2)], [np.float32(-3)], lr=0.5) == [0.5]
    # added in float32: more than half of the 2⁻⁷ between 1 and the next bfloat16
    step = np.float32(2**-8 + 2**-20)
    (got,) = evolution_update([jnp.bfloat16(1.0)], [step], lr=1.0)
    assert got.dtype == jnp.bfloat16
    assert got == 1.0078125


def test_update_by_z_scores_is_es_at_scale(params, key, rng):
    # θ + α/N Σ Z ε
    fitness, alpha = rng.normal(size=8).astype(np.float32), 0.01
    Z = (fitness - fitness.mean()) / (fitness.std() + 1e-8)
    expected = [np.array(x, np.float64) for x in jax.tree.leaves(params)]
    for member in range(8):
        for theta, epsilon in zip(expected, noise_of(key, member), strict=True):
            theta += alpha / 8 * Z[member] * np.asarray(epsilon)
    shaped, members = np.asarray(z_score(fitness)), np.arange(8)
    halves = [
        gradient_of(key, members[part], shaped[part], sigma=1.0)
        for part in (slice(4), slice(4, 8))
    ]
    gradient = jax.tree.map(np.add, *halves)
    close(jit(evolution_update)(params, gradient, lr=alpha), expected)


# errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": np.ones((2, 4), int)}, r"members has shape \(2, 4\), expected"),
        ({"fitness": np.ones(7)}, r"fitness has shape \(7,\), expected \(8,\)"),
        ({"sigma": 0.0}, "sigma is 0.0, expected"),
        ({"members": np.ones(8)}, "members is float32, expected an integer dtype"),
        (
            {"members": np.ones(0, int)},
            r"members has shape \(0,\), expected \[n\] with",
        ),
        ({"sigma": np.ones(3)}, r"sigma has shape \(3,\), expected \(\), a scalar"),
        (
            {"population_size": 6},
            r"population_size is 6, expected a number in \[8, inf",
        ),
        ({"population_size": 9}, "population_size is 9, expected an even one of pairs"),
        ({"ranks": {"layers": 1}}, "ranks lacks .* expected the structure of params"),
    ],
)
def test_gradient_with_bad_arguments_raises(key, changes, message):
    arguments = {"members": np.arange(8), "fitness": np.ones(8), "sigma": 1.0}
    arguments |= {"population_size": 8, "antithetic": True}
    with pytest.raises(ValueError, match=message):
        evolution_gradient(PARAMS, key, **(arguments | changes))


def test_an_odd_population_without_pairs_is_fine(key):
    function = functools.partial(
        evolution_gradient, PARAMS, key, sigma=1.0, population_size=9, antithetic=False
    )
    jax.eval_shape(function, np.arange(9), np.ones(9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0, expected"),
        ({"lr": float("inf")}, "lr is inf, expected"),
        ({"lr": np.ones(3)}, r"lr has shape \(3,\), expected \(\), a scalar"),
        ({"gradient": {}}, r"gradient lacks \['w'\], expected the structure of params"),
        (
            {"gradient": {"w": np.ones(3)}},
            r"gradient\['w'\] has shape \(3,\), expected \(",
        ),
        ({"gradient": {"w": LowRank(np.ones((3, 1)), np.ones((3, 1)))}}, "densify it"),
        (
            {"gradient": {"w": np.ones((3, 3), int)}},
            r"gradient\['w'\] is int64, expect",
        ),
        ({"params": {"w": 1.0}}, r"params\['w'\] is a Python float, expected a float"),
    ],
)
def test_update_with_bad_arguments_raises(changes, message):
    arguments = {"params": {"w": np.ones((3, 3))}, "gradient": {"w": np.ones((3, 3))}}
    with pytest.raises(ValueError, match=message):
        evolution_update(**(arguments | {"lr": 0.1} | changes))

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import aggregation, clipped_surrogate, policy_variants
from rlhf_jax.losses.policy_variants import cispo, gspo, gspo_token, sapo
from tests.losses import invariants

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "policy.npz"
LOW, HIGH, R_MIN, R_MAX, TAU_POS, TAU_NEG = 0.2, 0.3, 0.8, 1.3, 1.0, 2.0
gspo_by_row = functools.partial(gspo, clip_low=LOW, clip_high=HIGH)


def gspo_by_column(logprobs, old_logprobs, advantages, mask):
    """The advantages are the first column, so that every array is [B, T]."""
    return gspo_by_row(logprobs, old_logprobs, advantages[:, 0], mask)


KERNELS = {
    "gspo": gspo_by_column,
    "gspo_token": functools.partial(gspo_token, clip_low=LOW, clip_high=HIGH),
    "cispo": functools.partial(cispo, ratio_min=R_MIN, ratio_max=R_MAX),
    "sapo": functools.partial(sapo, tau_pos=TAU_POS, tau_neg=TAU_NEG),
}
NAMES = ["logprobs", "old_logprobs", "advantages", "mask"]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def random_arguments(rng, B=4, T=6):
    arrays = list(rng.normal(0.0, 0.5, (3, B, T)).astype(np.float32))
    mask = invariants.random_mask(rng, B, T)
    mask[:-1, 0] = True  # the column that gspo's advantages stand in
    return arrays, mask


def loss_and_gradient(function, logprobs, *others):
    """The loss of each token, the gradient of its sum in log π, and diagnostics."""

    def total(logprobs):
        losses, diagnostics = function(logprobs, *others)
        return losses.sum(), (losses, diagnostics)

    gradient, (losses, diagnostics) = jax.jit(jax.grad(total, has_aux=True))(logprobs)
    return losses, gradient, diagnostics


def of_ratios(function, ratios, advantages, logprobs=-1.5):
    """The same for given ratios π/π_old, of tokens that are all real."""
    logprobs = np.broadcast_to(np.float32(logprobs), np.shape(ratios))
    old_logprobs = (logprobs - np.log(ratios)).astype(np.float32)
    advantages = np.asarray(advantages, np.float32)
    mask = np.ones(logprobs.shape, bool)
    return loss_and_gradient(function, logprobs, old_logprobs, advantages, mask)


# values worked by hand


def test_gspo_worked_by_hand():
    # the geometric means of the ratios are √1.21 = 1.1, 1.1 and √0.81 = 0.9
    ratios = [[1.21, 1.0], [1.0, 1.21], [0.81, 1.0]]
    function = functools.partial(gspo, clip_low=0.05, clip_high=0.05)
    losses, gradient, diagnostics = of_ratios(function, ratios, [2.0, -2.0, -2.0])
    # max(-2.2, -2.1) = -2.1;  max(2.2, 2.1) = 2.2;  max(1.8, 1.9) = 1.9
    np.testing.assert_allclose(losses, [[-2.1] * 2, [2.2] * 2, [1.9] * 2], rtol=1e-6)
    # -A s ∇log π / 2 for each of two losses, where no clip is active
    np.testing.assert_allclose(gradient, [[0, 0], [2.2, 2.2], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(
        diagnostics.ratio, [[1.1] * 2, [1.1] * 2, [0.9] * 2], rtol=1e-6
    )
    clipped = [[True, True], [False, False], [True, True]]
    np.testing.assert_array_equal(diagnostics.clipped, clipped)
    # ½ ln²1.21 = ½ 0.1906204² = 0.0181681, and ½ ln²0.81 = 0.0222017
    np.testing.assert_allclose(
        diagnostics.approx_kl,
        [[0.0181681, 0.0], [0.0, 0.0181681], [0.0222017, 0.0]],
        rtol=1e-5,
    )


def test_gspo_token_worked_by_hand():
    # one ratio √1.21 = 1.1 for both tokens, a good and a bad one
    function = functools.partial(gspo_token, clip_low=0.05, clip_high=0.05)
    losses, gradient, diagnostics = of_ratios(function, [[1.21, 1.0]], [[2.0, -2.0]])
    # max(-2.2, -2.1) = -2.1 is cut, max(2.2, 2.1) = 2.2 has the gradient -A s = 2.2
    np.testing.assert_allclose(losses, [[-2.1, 2.2]], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.0, 2.2]], rtol=1e-6)
    np.testing.assert_allclose(diagnostics.ratio, [[1.1, 1.1]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics.clipped, [[True, False]])


def test_cispo_worked_by_hand():
    function = functools.partial(cispo, ratio_min=0.8, ratio_max=1.5)
    losses, gradient, diagnostics = of_ratios(
        function, [[0.5, 1.1, 3.0]], [[2.0, -1.0, 1.0]], logprobs=[[-2.0, -2.0, -0.5]]
    )
    # weights 0.8, 1.1 and 1.5: -0.8 · 2 · -2;  -1.1 · -1 · -2;  -1.5 · 1 · -0.5
    np.testing.assert_allclose(losses, [[3.2, -2.2, 0.75]], rtol=1e-6)
    # -w A, on both sides of the bounds
    np.testing.assert_allclose(gradient, [[-1.6, 1.1, -1.5]], rtol=1e-6)
    np.testing.assert_array_equal(diagnostics.clipped, [[True, False, True]])
    np.testing.assert_allclose(diagnostics.ratio, [[0.5, 1.1, 3.0]], rtol=1e-6)


def test_sapo_worked_by_hand():
    # τ is 1 where A > 0 and 2 elsewhere: both sigmoids are σ(1) = 0.7310586
    losses, gradient, diagnostics = of_ratios(
        KERNELS["sapo"], [[2.0, 1.5, 1.0]], [[1.0, -1.0, 0.0]]
    )
    # -(4/1) 0.7310586;  (4/2) 0.7310586
    np.testing.assert_allclose(losses, [[-2.9242344, 1.4621172, 0.0]], rtol=1e-6)
    # p (1 - p) = 0.1966119: -4 · 0.1966119 · 2 and 4 · 0.1966119 · 1.5
    np.testing.assert_allclose(gradient, [[-1.5728955, 1.1796716, 0.0]], rtol=1e-6)
    assert not diagnostics.clipped.any()


# oracles


def loop(kernel, logprobs, old_logprobs, advantages, mask):
    """Losses, slopes of their sum in log π, and what was clipped; in double."""
    losses, slopes, clipped = (np.zeros(mask.shape) for _ in range(3))
    for i in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[i, t]]
        drift = {t: float(logprobs[i, t]) - float(old_logprobs[i, t]) for t in real}
        for t in real:
            A, r = float(advantages[i, t]), np.exp(drift[t])
            if kernel in ("gspo", "gspo_token"):
                r = np.prod([np.exp(d) for d in drift.values()]) ** (1 / len(real))
                A = float(advantages[i, 0]) if kernel == "gspo" else A
                edge = 1 + HIGH if A > 0 else 1 - LOW
                clipped[i, t] = (A > 0 and r > edge) or (A < 0 and r < edge)
                losses[i, t] = -A * (edge if clipped[i, t] else r)
                slope = 0.0 if clipped[i, t] else -A * r
                if kernel == "gspo":
                    slopes[i, real] += slope / len(real)
                else:
                    slopes[i, t] = slope
            elif kernel == "cispo":
                weight = R_MIN if r < R_MIN else R_MAX if r > R_MAX else r
                losses[i, t] = -weight * A * float(logprobs[i, t])
                slopes[i, t], clipped[i, t] = -weight * A, weight != r
            else:
                tau = TAU_POS if A > 0 else TAU_NEG
                gate = 1 / (1 + np.exp(-tau * (r - 1)))
                losses[i, t] = -4 / tau * gate * A
                slopes[i, t] = -4 * gate * (1 - gate) * r * A
    return losses, slopes, clipped


@each_kernel
def test_equals_a_loop(rng, kernel):
    arrays, mask = random_arguments(rng, B=40, T=5)
    losses, gradient, diagnostics = loss_and_gradient(KERNELS[kernel], *arrays, mask)
    expected, slopes, clipped = loop(kernel, *arrays, mask)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(diagnostics.clipped, clipped)
    kl = np.where(mask, (arrays[0] - arrays[1]) ** 2 / 2, 0.0)
    np.testing.assert_allclose(diagnostics.approx_kl, kl, rtol=1e-5, atol=1e-7)
    assert clipped.any() == (kernel != "sapo") and not clipped.all()


@pytest.mark.parametrize("kernel", ["gspo_token", "cispo", "sapo"])
def test_equals_verl(kernel):
    fixture = np.load(FIXTURE)
    arrays = [fixture[name] for name in NAMES]
    name = kernel.removesuffix("_token")  # its gspo is the token form
    hyper_parameters = json.loads(str(fixture["settings"]))[f"verl/{name}"]
    mode = policy_variants.VARIANTS[name].aggregation

    def mean(logprobs):
        losses, diagnostics = getattr(policy_variants, kernel)(
            logprobs, *arrays[1:], **hyper_parameters
        )
        total, count = aggregation.aggregate(losses, arrays[-1], mode=mode)
        return total / count, diagnostics

    (value, diagnostics), gradient = jax.value_and_grad(mean, has_aux=True)(arrays[0])
    np.testing.assert_allclose(value, fixture[f"verl/{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, fixture[f"verl/{name}/gradient"], rtol=1e-5)
    assert diagnostics.clipped.any() == (kernel != "sapo")


@pytest.mark.parametrize("name", policy_variants.VARIANTS)
def test_variant_equals_trl(name):
    """The loss, its aggregation and their names; `row_advantages` are of responses."""
    fixture = np.load(FIXTURE)
    settings = json.loads(str(fixture["settings"]))
    mask, logprobs = fixture["mask"], fixture["logprobs"]
    variant = policy_variants.variant(name)
    advantages = np.broadcast_to(fixture["row_advantages"][:, None], mask.shape)

    arrays = fixture["old_logprobs"], advantages, mask

    def pair(logprobs):
        losses, diagnostics = variant.loss(logprobs, *arrays, **settings[f"trl/{name}"])
        total, count = aggregation.aggregate(
            losses, mask, mode=variant.aggregation, max_length=settings["max_length"]
        )
        return total, count, diagnostics

    total, count, diagnostics = pair(logprobs)
    gradient = jax.grad(lambda x: pair(x)[0])(logprobs)
    assert diagnostics.clipped.any() == (name != "sapo")
    assert not diagnostics.clipped[mask].all()
    # TRL on the responses with a real token: the last has none
    np.testing.assert_allclose(total / count, fixture[f"trl/{name}/loss"], rtol=1e-5)
    expected = np.pad(fixture[f"trl/{name}/gradient"], ((0, 1), (0, 0)))
    np.testing.assert_allclose(gradient / count, expected, rtol=1e-5)
    # and on all: where it averages over responses, one without a token is one more
    if variant.aggregation != "token_mean":
        count = count * len(mask) / (len(mask) - 1)
    np.testing.assert_allclose(
        total / count, fixture[f"trl/{name}_all/loss"], rtol=1e-5
    )


# where the gradient is cut


def test_gradient_by_sign_of_the_advantage_and_side_of_the_ratio():
    """A row for each pair; clips at 1 - 0.3 and 1 + 0.4."""
    ratio, A = (
        x.reshape(-1, 1) for x in np.meshgrid([0.5, 0.75, 1, 1.25, 1.5], [2, -2, 0])
    )
    cut = (A > 0) & (ratio > 1.4) | (A < 0) & (ratio < 0.7)
    assert cut.sum() == 2
    # three tokens of other ratios, whose geometric mean is the row's
    ratios, every_token = ratio * [[0.8, 1.0, 1.25]], np.repeat(A, 3, 1)
    expected = np.repeat(np.where(cut, 0.0, -A * ratio), 3, 1)
    for function, advantages in ((gspo, A[:, 0]), (gspo_token, every_token)):
        function = functools.partial(function, clip_low=0.3, clip_high=0.4)
        _, gradient, diagnostics = of_ratios(function, ratios, advantages)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)
        np.testing.assert_array_equal(diagnostics.clipped, np.repeat(cut, 3, 1))

    # cispo bounds the weight, whatever the sign, and cuts nothing; nor does its weight
    # have a gradient, which were larger the less likely the token
    function = functools.partial(cispo, ratio_min=0.7, ratio_max=1.4)
    ratios = np.repeat(ratio, 3, 1)
    _, gradient, diagnostics = of_ratios(
        function, ratios, every_token, logprobs=[[-0.1, -1.0, -5.0]]
    )
    weight = np.clip(ratios, 0.7, 1.4)
    np.testing.assert_allclose(gradient, -weight * every_token, rtol=1e-5)
    np.testing.assert_array_equal(diagnostics.clipped, weight != ratios)

    # sapo cuts nothing either, and fades away from one on both sides
    _, gradient, _ = of_ratios(KERNELS["sapo"], ratios, every_token)
    vanilla = -every_token * ratios
    assert (np.sign(gradient) == np.sign(vanilla)).all()
    faded = (np.abs(gradient) < 0.999 * np.abs(vanilla))[every_token != 0]
    np.testing.assert_array_equal(faded, (ratios != 1)[every_token != 0])


@each_kernel
def test_neither_diagnostics_nor_the_weight_of_cispo_carry_a_gradient(rng, kernel):
    arrays, mask = random_arguments(rng)

    def total(logprobs, old_logprobs):
        losses, diagnostics = KERNELS[kernel](logprobs, old_logprobs, arrays[2], mask)
        return diagnostics.ratio.sum() + diagnostics.approx_kl.sum(), losses.sum()

    diagnostics, losses = jax.jit(jax.jacrev(total, (0, 1)))(*arrays[:2])
    assert not np.asarray(diagnostics).any()
    assert np.asarray(losses[0]).any()
    assert np.asarray(losses[1]).any() == (kernel in ("gspo", "sapo"))


@each_kernel
def test_ratio_one_gives_the_vanilla_policy_gradient(rng, kernel):
    (logprobs, _, advantages), mask = random_arguments(rng)
    if kernel == "gspo":  # one advantage for a response
        advantages = np.broadcast_to(advantages[:, :1], mask.shape)
    _, gradient, diagnostics = loss_and_gradient(
        KERNELS[kernel], logprobs, logprobs, advantages, mask
    )
    expected = np.where(mask, -advantages, 0.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert (diagnostics.ratio == 1).all() and not diagnostics.clipped.any()
    assert not np.asarray(diagnostics.approx_kl).any()


def test_gspo_of_equal_advantages_is_gspo_token_and_the_papers_objective(rng):
    (logprobs, old_logprobs, advantages), mask = random_arguments(rng, B=12)
    equal = np.broadcast_to(advantages[:, :1], mask.shape)

    def mean(logprobs, kernel):
        losses, _ = KERNELS[kernel](logprobs, old_logprobs, equal, mask)
        total, count = aggregation.sequence_mean(losses, mask)
        return total / count

    value, gradient = jax.value_and_grad(mean)(logprobs, "gspo")
    value_of_token, gradient_of_token = jax.value_and_grad(mean)(logprobs, "gspo_token")
    np.testing.assert_allclose(value_of_token, value, rtol=1e-6)
    np.testing.assert_allclose(gradient_of_token, gradient, rtol=1e-5, atol=1e-7)
    assert np.asarray(gradient).any()
    objective = []
    for i in range(11):  # the last row has no real token
        drift = (logprobs - old_logprobs)[i, mask[i]].astype(np.float64)
        s, A = np.exp(drift.mean()), advantages[i, 0]
        objective.append(min(s * A, np.clip(s, 1 - LOW, 1 + HIGH) * A))
    np.testing.assert_allclose(value, -np.mean(objective), rtol=1e-5)


def test_gspo_of_one_token_is_the_clipped_surrogate(rng):
    arrays = list(rng.normal(0.0, 0.5, (3, 20, 1)).astype(np.float32))
    mask = np.ones((20, 1), bool)
    surrogate = functools.partial(clipped_surrogate, clip_low=LOW, clip_high=HIGH)
    expected = loss_and_gradient(surrogate, *arrays, mask)
    for kernel in ("gspo", "gspo_token"):
        got = loss_and_gradient(KERNELS[kernel], *arrays, mask)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


@each_kernel
def test_a_broken_sample_overflows_nothing(kernel):
    ratios = np.exp(np.array([[-80.0, 80.0, 80.0], [80.0, 80.0, 80.0]], np.float32))
    advantages = [[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]]
    losses, gradient, diagnostics = of_ratios(KERNELS[kernel], ratios, advantages)
    assert np.isfinite(losses).all() and np.isfinite(gradient).all()
    # e²⁰ = 4.8516520e8 is the greatest ratio, and beyond it nothing moves but by cispo
    np.testing.assert_allclose(diagnostics.ratio[1], [4.8516520e8] * 3, rtol=1e-6)
    expected = R_MAX if kernel == "cispo" else 0.0
    np.testing.assert_allclose(gradient[1], [expected] * 3, rtol=1e-6)


@each_kernel
def test_shapes_and_dtypes(rng, kernel):
    arrays, mask = random_arguments(rng)
    losses, diagnostics = KERNELS[kernel](*arrays, mask)
    assert losses.shape == diagnostics.clipped.shape == mask.shape
    assert losses.dtype == jnp.float32 and diagnostics.clipped.dtype == jnp.bool_
    assert not np.asarray(losses)[~mask].any()


@pytest.mark.parametrize("kernel", ["gspo_token", "cispo", "sapo"])
def test_wrong_shape_raises(rng, kernel):
    arrays, mask = random_arguments(rng)
    invariants.assert_wrong_shapes_raise(KERNELS[kernel], [*arrays, mask], NAMES)


def test_gspo_of_a_wrong_shape_raises(rng):
    (logprobs, old_logprobs, advantages), mask = random_arguments(rng)
    with pytest.raises(
        ValueError, match=r"advantages has shape \(4, 6\), expected \(4,\)"
    ):
        gspo_by_row(logprobs, old_logprobs, advantages, mask)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(4, 5\), expected"):
        gspo_by_row(logprobs, old_logprobs[:, :5], advantages[:, 0], mask)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 6\), expected \(4, 6\)"):
        gspo_by_row(logprobs, old_logprobs, advantages[:, 0], mask[:3])
    with pytest.raises(ValueError, match=r"logprobs has shape \(6,\), expected \[B, T"):
        gspo_by_row(logprobs[0], old_logprobs[0], advantages[0], mask[0])


@pytest.mark.parametrize(
    ("function", "hyper_parameters", "name"),
    [
        (gspo_token, {"clip_low": 1.1, "clip_high": 0.2}, "clip_low"),
        (gspo_token, {"clip_low": 0.1, "clip_high": -0.2}, "clip_high"),
        # a distance from one, where the bound itself is asked for
        (cispo, {"ratio_max": 0.2}, "ratio_max"),
        (cispo, {"ratio_max": 5.0, "ratio_min": 1.2}, "ratio_min"),
        (sapo, {"tau_pos": 0.0, "tau_neg": 1.0}, "tau_pos"),
        (sapo, {"tau_pos": 1.0, "tau_neg": -1.0}, "tau_neg"),
    ],
)
def test_hyper_parameters_out_of_range_raise(rng, function, hyper_parameters, name):
    arrays, mask = random_arguments(rng)
    value = hyper_parameters[name]
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a number in"):
        function(*arrays, mask, **hyper_parameters)


def test_an_unknown_variant_raises_with_the_known_ones():
    with pytest.raises(ValueError, match="name is 'ppo', expected one of") as error:
        policy_variants.variant("ppo")
    assert all(name in str(error.value) for name in policy_variants.VARIANTS)

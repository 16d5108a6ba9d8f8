import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.losses import _checks, evolution, fitness, kl, masked, perturbations
from rlhf_jax.losses._trees import check_same_structure
from tests.losses.catalogue import KERNELS, UNEMBEDDING

B, T, D = 3, 4, 3
V = len(UNEMBEDDING)
MASK = np.ones((B, T), bool)


def tokens(rng, n):
    return list(rng.normal(size=(n, B, T)).astype(np.float32))


# masks and labels


@pytest.mark.parametrize("name", KERNELS)
def test_a_mask_of_floats_raises_by_name(name):
    """Another argument in its place, or a 0 and -1e9 that is added to scores."""
    kernel = KERNELS[name]
    arrays, mask = kernel.example(np.random.default_rng(0), 3, 4)
    if name == "preference.ld_logprobs":  # whose call makes masks of it
        kernel = kernel._replace(
            call=lambda x, y, m: losses.ld_logprobs(x, y, m, m, alpha=0.4)
        )
    for wrong in (mask.astype(np.float32), np.where(mask, 0.0, -1e9)):
        with pytest.raises(ValueError, match=r"mask is float\d\d, expected bool"):
            kernel.call(*arrays, wrong)
    with pytest.raises(ValueError, match=r"mask is float32, expected bool or int"):
        jax.jit(kernel.call)(*arrays, mask.astype(np.float32))


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8])
def test_a_mask_of_integers_is_one_of_bools(rng, dtype):
    x, mask = rng.normal(size=(B, T)), rng.random((B, T)) < 0.7
    np.testing.assert_array_equal(
        masked.sum(x, mask.astype(dtype)), masked.sum(x, mask)
    )


def test_labels_that_are_not_bool_raise():
    for finished in ([1, -1], [1.0, 0.0], np.array([1, 0])):
        with pytest.raises(ValueError, match=r"^finished is .*32, expected bool"):
            losses.missing_eos_penalty(np.zeros(2), finished, penalty=1.0)
    got = losses.missing_eos_penalty(np.zeros(2), [True, False], penalty=1.0)
    np.testing.assert_array_equal(got, [0.0, -1.0])


# numbers


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), np.float16(3)])
def test_a_number_is_one_of_python_or_of_numpy(value):
    assert _checks.is_number(value)
    assert not _checks.is_zero(value)
    assert _checks.is_zero(value - value)
    _checks.check_range("x", value, _checks.TINY, _checks.MAX)
    with pytest.raises(ValueError, match=r"x is 3(\.0)?, expected a number in \[4, 5"):
        _checks.check_range("x", value, 4, 5)


@pytest.mark.parametrize("value", [True, np.bool_(True), "3", [3], 3j])
def test_what_is_no_number_raises(rng, value):
    assert not _checks.is_number(value)
    arrays = tokens(rng, 3)
    for name in ("clip_low", "clip_high"):
        options = {"clip_low": 0.2, "clip_high": 0.2, name: value}
        with pytest.raises(ValueError, match=f"{name} is .*, expected a number"):
            losses.clipped_surrogate(*arrays, MASK, **options)


def test_a_scalar_array_passes_and_another_raises():
    _checks.check_range("x", jnp.float32(9.0), 0, 1)
    _checks.check_range("x", np.array(9.0), 0, 1)
    _checks.check_range("x", None, 0, 1)
    for array in (np.ones(1), jnp.ones(4)):
        with pytest.raises(ValueError, match=r"x has shape \(.,\), .* a scalar"):
            _checks.check_range("x", array, 0, 1)


ROWS = np.full(B, -1.0, np.float32)
WITH_AN_ARRAY = {
    "kl_coef": lambda x: losses.kl_shaped_rewards(
        ROWS, np.ones((B, T)), MASK, kl_coef=x
    ),
    "penalty": lambda x: losses.missing_eos_penalty(ROWS, MASK[:, 0], penalty=x),
    "beta": lambda x: losses.implicit_rewards(ROWS, ROWS, ROWS, ROWS, beta=x),
    "gamma": lambda x: losses.simpo(ROWS, ROWS, beta=1.0, gamma=x),
    "alpha": lambda x: losses.simpo(ROWS, ROWS, beta=1.0, gamma=0.0, alpha=x),
    "lam": lambda x: losses.gae(np.ones((B, T)), np.ones((B, T)), MASK, gamma=1, lam=x),
    "kl": lambda x: losses.kto(
        *(ROWS, ROWS, MASK[:, 0], x),
        **{"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    ),
}


@pytest.mark.parametrize("name", WITH_AN_ARRAY)
def test_a_hyper_parameter_for_each_row_or_token_raises(name):
    for array in (np.ones(B), jnp.ones(T)):
        with pytest.raises(ValueError, match=rf"^{name} has shape \(.,\), .* a scalar"):
            WITH_AN_ARRAY[name](array)


def test_numbers_of_numpy_are_those_of_python():
    options = {"target": 6.0, "num_samples": 40}
    plain = losses.adaptive_kl_coef(0.15, 60.0, horizon=10, **options)
    got = losses.adaptive_kl_coef(0.15, 60.0, horizon=np.int64(10), **options)
    np.testing.assert_array_equal(got, plain)
    with pytest.raises(ValueError, match=r"num_samples is 512, .* \[0, 50"):
        losses.adaptive_kl_coef(
            0.15, 60.0, horizon=np.int64(10), target=6.0, num_samples=512
        )
    with pytest.raises(ValueError, match=r"max_length is 30, .* \[40, inf"):
        losses.overlong_penalty(
            np.array([3]), max_length=30, buffer=np.int64(40), factor=1.0
        )
    pairs = [ROWS] * 4
    for zero in (0, 0.0, np.float32(0), np.int64(0)):
        losses.dpo(*pairs, beta=0.1, loss_type="hinge", label_smoothing=zero)
        with pytest.raises(ValueError, match=r"label_smoothing is 0.*, expected"):
            losses.dpo(*pairs, beta=0.1, loss_type="exo_pair", label_smoothing=zero)
        # the square of 1e20 is inf, and inf · 0 is nan
        high = np.array([1e20], np.float32)
        assert np.isfinite(losses.bradley_terry(high, high, centering=zero)).all()
        safe = np.array([True])
        cost = losses.cost_model_loss(-high, high, safe, ~safe, regularization=zero)
        assert np.isfinite(cost).all()
        with pytest.raises(ValueError, match=r"alpha is 0.*, expected another"):
            losses.simpo(ROWS, ROWS, beta=1.0, gamma=0.0, alpha=zero)
    with pytest.raises(ValueError, match="population_size is 3, expected an even"):
        evolution.evolution_gradient(
            {"w": np.ones(2, np.float32)},
            jax.random.key(0),
            np.arange(2),
            np.ones(2),
            sigma=1.0,
            population_size=np.int64(3),
            antithetic=True,
        )


# whole numbers

HIDDEN = np.zeros((B, T, D), np.float32)
WHOLE = {
    "group_size": [
        lambda x: losses.group_relative(np.ones(8), group_size=x, scale="none"),
        lambda x: losses.leave_one_out(np.ones(8), group_size=x),
        lambda x: fitness.z_score(np.ones(8), group_size=x),
    ],
    "chunk_size": [
        lambda x: losses.log_sum_squares(
            HIDDEN, UNEMBEDDING, temperature=1.0, chunk_size=x
        )
    ],
    "batch_shards": [
        lambda x: losses.token_logprobs(
            *(HIDDEN, UNEMBEDDING, np.zeros((B, T), int)),
            **{"temperature": 1.0, "chunk_size": 1, "batch_shards": x},
        )
    ],
    "k": [
        lambda x: losses.top_logprobs(
            HIDDEN, UNEMBEDDING, k=x, temperature=1.0, chunk_size=None
        )
    ],
    "rank": [
        lambda x: perturbations.low_rank_noise(
            jax.random.key(0), (3, 4), 0, rank=x, antithetic=False
        )
    ],
}


@pytest.mark.parametrize("value", [4.0, 2.5, True, "4", 0, np.float32(4)])
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_whole_number_raises(name, value):
    for call in WHOLE[name]:
        with pytest.raises(ValueError, match=rf"^{name} is {value}, .* whole number"):
            call(value)


def test_a_whole_number_may_be_of_numpy():
    for call in (*WHOLE["group_size"], *WHOLE["k"], *WHOLE["rank"]):
        call(np.int64(4))


def test_a_member_that_is_no_integer_raises():
    with pytest.raises(ValueError, match="member is float32, expected an integer"):
        perturbations.member_key(jax.random.key(0), 2.0, antithetic=False)


# arrays of floats


def targets_of(hidden, unembedding, **options):
    return losses.token_logprobs(hidden, unembedding, np.zeros((B, T), int), **options)


def exact(hidden, unembedding, **options):
    return kl.exact(hidden, unembedding, HIDDEN, UNEMBEDDING, **options)


def reference(hidden, unembedding, **options):
    return kl.exact(HIDDEN, UNEMBEDDING, hidden, unembedding, **options)


@pytest.mark.parametrize(
    "function",
    [
        targets_of,
        exact,
        reference,
        losses.log_sum_squares,
        functools.partial(losses.top_logprobs, k=2),
    ],
)
def test_states_that_are_not_float_raise(function):
    """Integers would cut off the fractions of the unembedding."""
    call = functools.partial(function, temperature=1.0, chunk_size=None)
    for hidden in (HIDDEN.astype(np.int32), HIDDEN.tolist()):
        with pytest.raises(ValueError, match=r"hidden is .*, expected a float dtype"):
            call(hidden, UNEMBEDDING)
    for unembedding in (UNEMBEDDING.astype(np.int32), UNEMBEDDING.tolist()):
        with pytest.raises(ValueError, match=r"unembedding is .*, expected a float"):
            call(HIDDEN, unembedding)


def test_logits_may_be_a_list():
    logits = np.zeros((B, T, V)).tolist()
    targets = np.zeros((B, T), int)
    got, _ = losses.logprobs_from_logits(logits, targets, MASK, temperature=1.0)
    np.testing.assert_allclose(got, np.full((B, T), -np.log(V)), rtol=1e-6)
    got = kl.exact_from_logits(logits, logits, MASK, temperature=1.0)
    np.testing.assert_array_equal(got, np.zeros((B, T)))


# epsilons


@pytest.mark.parametrize("eps", [0.0, -5.0, np.nan])
def test_an_epsilon_that_is_not_positive_raises(rng, eps):
    (x,) = tokens(rng, 1)
    for call in (
        lambda: masked.whiten(x, MASK, shift_mean=True, eps=eps),
        lambda: losses.reinforce_plus_plus(x, MASK, gamma=1.0, eps=eps),
        lambda: losses.log_odds_ratio(ROWS, ROWS, eps=eps),
    ):
        with pytest.raises(ValueError, match=f"eps is {eps}, expected a number in"):
            call()


# trees


def test_a_leaf_in_place_of_a_tree_is_told_as_one():
    params = {"a": np.ones(2), "b": np.ones(2)}
    message = r"^ranks is a single leaf, expected the structure of params, .*'a': \*"
    with pytest.raises(ValueError, match=message):
        check_same_structure("ranks", 1, params)
    message = r"^ranks is PyTreeDef\(\{'a'.*, expected the .* params, PyTreeDef\(\*\)"
    with pytest.raises(ValueError, match=message):
        check_same_structure("ranks", params, np.ones(2))
    with pytest.raises(ValueError, match=r"^ranks lacks \['a'\], \['b'\], expected"):
        check_same_structure("ranks", {}, params)

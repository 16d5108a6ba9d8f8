"""Linear CKA: against its other form, and what it must not see."""

import jax
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.analysis.representations import MAX_TOKENS, make_probe, similarity
from rlhf_jax.rollout.logprobs import Transcript

from .small_model import draw_params, small_model

MODEL = small_model()
# A model whose weights are its states.
GIVEN = MODEL._replace(layer_states=lambda params, tokens, mask: params)


def transcript_of(rng, B, P, N):
    lengths = rng.integers(1, N + 1, B)
    left = rng.integers(0, P, B)
    return Transcript(
        rng.integers(2, 300, (B, P), dtype=np.int32),
        np.arange(P) >= left[:, None],
        rng.integers(2, 300, (B, N), dtype=np.int32),
        np.arange(N) < lengths[:, None],
    )


def cka(x, y):
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred states [n, D], Frobenius norms."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.linalg.norm
    return norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def states_of(params, transcript):
    """[L] lists of the states of the response's real tokens, one after the other."""
    tokens = np.concatenate([transcript.prompts, transcript.responses], axis=1)
    mask = np.concatenate([transcript.prompt_mask, transcript.mask], axis=1)
    layers = jax.jit(MODEL.layer_states)(params, tokens, mask)
    P = transcript.prompts.shape[1]
    return [
        np.array([layer[i, P + t] for i, t in np.argwhere(transcript.mask)])
        for layer in np.asarray(layers, np.float64)
    ]


def test_cka_is_that_of_the_states():
    transcript = transcript_of(np.random.default_rng(0), 6, 5, 7)
    reference, params = (draw_params(MODEL, seed) for seed in (0, 1))
    probe = make_probe(MODEL, reference, transcript)
    found = similarity(MODEL, params, probe)
    pairs = zip(states_of(params, transcript), states_of(reference, transcript))
    wanted = [cka(x, y) for x, y in pairs]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert found.shape == (2,) and (found > 0).all() and (found < 0.99).all()
    np.testing.assert_allclose(similarity(MODEL, reference, probe), 1.0, rtol=1e-12)


@pytest.fixture(scope="module")
def given():
    """[L, B, T, D] states, and a transcript of all of these tokens."""
    rng = np.random.default_rng(1)
    everything = np.ones((4, 6), bool)
    transcript = Transcript(
        np.zeros((4, 1), np.int32),
        everything[:, :1],
        np.zeros((4, 6), np.int32),
        everything,
    )
    return rng.normal(size=(3, 4, 7, 5)).astype(np.float32), transcript


def test_rotation_scale_and_shift_are_not_seen(given):
    states, transcript = given
    turn = stats.ortho_group.rvs(5, random_state=0).astype(np.float32)
    probe = make_probe(GIVEN, states, transcript)
    found = similarity(GIVEN, 7.0 * states @ turn + 3.0, probe)
    np.testing.assert_allclose(found, 1.0, atol=1e-5)
    stretched = states * np.array([1, 1, 1, 1, 9], np.float32)
    assert (similarity(GIVEN, stretched, probe) < 0.9).all()


def test_only_real_tokens_of_responses_are_seen(given):
    states, transcript = given
    mask = transcript.mask.copy()
    mask[1, 3:] = False
    transcript = transcript._replace(mask=mask)
    probe = make_probe(GIVEN, states, transcript)
    other = states.copy()
    other[:, :, 0] = 50.0  # the prompts
    other[:, 1, 4:] = -50.0  # padding
    np.testing.assert_allclose(similarity(GIVEN, other, probe), 1.0, rtol=1e-12)
    other[:, 0, 1] = 50.0
    assert (similarity(GIVEN, other, probe) < 0.9).all()


def test_a_layer_that_says_the_same_of_all_tokens(given):
    """It has no spread to be compared: 0, and no division by it."""
    states, transcript = given
    probe = make_probe(GIVEN, states, transcript)
    assert similarity(GIVEN, np.ones_like(states), probe).tolist() == [0, 0, 0]


def test_the_number_of_tokens_is_bounded():
    transcript = transcript_of(np.random.default_rng(0), 100, 2, 12)
    states = np.random.default_rng(1).normal(size=(1, 100, 14, 3)).astype(np.float32)
    probe = make_probe(GIVEN, states, transcript)
    assert transcript.mask.sum() > MAX_TOKENS
    assert probe.grams.shape == (1, MAX_TOKENS, MAX_TOKENS)
    places = np.argwhere(transcript.mask)[:MAX_TOKENS] + np.array([0, 2])
    assert np.argwhere(probe.chosen).tolist() == places.tolist()

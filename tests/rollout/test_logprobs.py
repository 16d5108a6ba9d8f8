import jax
import numpy as np
import pytest

from rlhf_jax.rollout.logprobs import Transcript, response_hidden, score_responses

LENGTHS = np.array([5, 3, 1, 5, 4, 2, 5, 3])
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def transcript(llama):
    rng = np.random.default_rng(1)
    mask = np.arange(5) < LENGTHS[:, None]
    responses = np.where(mask, rng.integers(3, 96, mask.shape), 0).astype(np.int32)
    return Transcript(llama.prompts, llama.prompt_mask, responses, mask)


def score(llama, transcript, chunk_size=None):
    static = {"temperature": TEMPERATURE, "chunk_size": chunk_size}
    jitted = jax.jit(score_responses, static_argnames=("model", *static))
    return jax.device_get(jitted(llama.model, llama.params, transcript, **static))


@pytest.fixture(scope="module")
def scored(llama, transcript):
    return score(llama, transcript)


def test_equal_to_each_row_alone_and_unpadded(llama, transcript, scored):
    """Logits of a plain forward pass and NumPy's log-softmax of them."""
    forward = jax.jit(
        lambda params, tokens: llama.model.unembed(
            params, llama.model.apply(params, tokens, tokens >= 0)
        )
    )
    for row in range(4):
        length = LENGTHS[row]
        prompt = transcript.prompts[row][transcript.prompt_mask[row]]
        response = transcript.responses[row, :length]
        logits = forward(llama.params, np.concatenate([prompt, response])[None])
        z = np.asarray(logits, np.float64)[0, len(prompt) - 1 : -1] / TEMPERATURE
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        np.testing.assert_allclose(
            scored.logprobs[row, :length],
            logp[np.arange(length), response],
            atol=1e-5,
        )
        entropy = -(np.exp(logp) * logp).sum(-1)
        np.testing.assert_allclose(scored.entropy[row, :length], entropy, atol=1e-5)


def test_hidden_states_are_those_that_predict(llama, transcript, scored):
    """First that of the prompt's last token; not that of the last response token."""
    hidden = jax.jit(response_hidden, static_argnums=0)(
        llama.model, llama.params, transcript
    )
    np.testing.assert_allclose(hidden, scored.hidden, atol=1e-6)
    assert hidden.shape == (8, 5, 32)
    tokens, mask = transcript.prompts, transcript.prompt_mask
    alone = jax.jit(llama.model.apply)(llama.params, tokens, mask)
    np.testing.assert_allclose(hidden[:, 0], alone[:, -1], atol=1e-5)


def test_padding_says_nothing(llama, transcript, scored):
    assert (scored.logprobs[~transcript.mask] == 0).all()
    assert (scored.entropy[~transcript.mask] == 0).all()
    other = transcript._replace(
        prompts=np.where(transcript.prompt_mask, transcript.prompts, 77),
        responses=np.where(transcript.mask, transcript.responses, 10**6),
    )
    again = score(llama, other)
    np.testing.assert_array_equal(again.logprobs, scored.logprobs)
    np.testing.assert_array_equal(again.entropy, scored.entropy)


@pytest.mark.parametrize("chunk_size", [2, 5])
def test_chunks_change_nothing(llama, transcript, scored, chunk_size):
    again = score(llama, transcript, chunk_size)
    np.testing.assert_allclose(again.logprobs, scored.logprobs, atol=1e-5)
    np.testing.assert_allclose(again.entropy, scored.entropy, atol=1e-5)

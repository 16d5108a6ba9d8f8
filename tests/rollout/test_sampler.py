import re

import jax
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.data.tokenizer import encode_prompts, special_tokens, train_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.transformer import make_model
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.sampler import (
    check_engine,
    check_lengths,
    make_sampler,
    records,
)

PROMPTS = [
    *("the film", "a", "the cat sat", "I saw it", "what a", "film", "cat", "sat on"),
]
SETTINGS = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat", "I saw it, what a film"], 280)


@pytest.fixture(scope="module")
def model():
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "max_positions": 24}
    return make_model(
        TransformerConfig(
            vocab_size=280, d_model=8, num_layers=1, d_ff=8, init_std=0.5, **sizes
        )
    )


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=4, fsdp=2)


@pytest.fixture(scope="module")
def sample(model, tokenizer, mesh):
    return make_sampler(model, tokenizer, mesh, prompt_tokens=8, **SETTINGS)


@pytest.fixture(scope="module")
def rollout(sample, params, mesh):
    with jax.set_mesh(mesh):
        return sample(params, PROMPTS, jax.random.key(1), range(8))


def test_texts_and_arrays_say_the_same(rollout, tokenizer):
    assert rollout.prompts == PROMPTS
    tokens, mask = encode_prompts(tokenizer, PROMPTS, length=8)
    transcript = jax.device_get(rollout.transcript)
    np.testing.assert_array_equal(transcript.prompts, tokens)
    np.testing.assert_array_equal(transcript.prompt_mask, mask)
    np.testing.assert_array_equal(transcript.responses, rollout.samples.tokens)
    np.testing.assert_array_equal(transcript.mask, rollout.samples.mask)
    assert transcript.responses.shape == (8, 6)
    eos = special_tokens(tokenizer).eos
    for prompt, text, ids, real in zip(
        PROMPTS, rollout.responses, transcript.responses, transcript.mask
    ):
        said = [int(i) for i in ids[real] if i != eos]
        whole = tokenizer(prompt).input_ids + said
        assert prompt + text == tokenizer.decode(whole, skip_special_tokens=True)


def test_arrays_lie_over_the_rows_of_the_mesh(rollout):
    tokens = rollout.transcript.prompts
    assert tokens.sharding.shard_shape(tokens.shape) == (1, 8)


def test_a_response_follows_its_index(sample, params, mesh, rollout):
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    with jax.set_mesh(mesh):
        again = sample(params, [PROMPTS[i] for i in order], jax.random.key(1), order)
        other = sample(params, PROMPTS, jax.random.key(1), range(8, 16))
    assert again.responses == [rollout.responses[i] for i in order]
    assert sum(a != b for a, b in zip(other.responses, rollout.responses)) >= 7


def test_records(rollout):
    scores = {"reward": np.arange(8.0), "reward/vader": np.ones(8, np.float32)}
    kl = np.linspace(0, 1, 8).astype(np.float32)
    rows = records(rollout, scores, kl, split="train", seed=5)
    assert len(rows) == 8
    mask = np.asarray(rollout.samples.mask)
    finished = np.asarray(rollout.samples.finished)
    for i, row in enumerate(rows):
        assert row == {
            "split": "train",
            "prompt": PROMPTS[i],
            "response": rollout.responses[i],
            "reward": float(i),
            "reward/vader": 1.0,
            "kl": float(kl[i]),
            "tokens": int(mask[i].sum()),
            "finish": "eos" if finished[i] else "length",
            "seed": 5,
            "index": i,
        }
        assert {type(value) for value in row.values()} <= {str, float, int}


def test_what_cannot_be_sampled(sample, params, model):
    with pytest.raises(UserError, match="the number of prompts=3 does not divide"):
        sample(params, PROMPTS[:3], jax.random.key(1), range(3))
    long = [*PROMPTS[:7], "the cat sat on the mat, what a film, I saw it"]
    with pytest.raises(UserError, match=r"prompt 7 has .* tokens, more than the 8"):
        sample(params, long, jax.random.key(1), range(8))
    check_lengths(model, 8, 16)
    with pytest.raises(UserError, match=r"make 25 tokens, more than .* context of 24"):
        check_lengths(model, 8, 17)


def test_groups_stand_next_to_each_other(sample, params, mesh):
    with jax.set_mesh(mesh):
        got = sample(params, PROMPTS, jax.random.key(1), range(16))
        asked = [prompt for prompt in PROMPTS for _ in range(2)]
        expected = sample(params, asked, jax.random.key(1), range(16))
    assert got.prompts == asked
    assert got.responses == expected.responses
    for x, y in zip(got.transcript, expected.transcript, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"slots": -1}, "slots=-1 must be at least 0"),
        ({"slots": 3}, "slots=3 does not divide over the 4 rows of the mesh"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' is unknown; take one of ''"),
    ],
)
def test_an_engine_that_cannot_be(settings, sentence):
    drawn_as = Sampling(6, 1.0, 0, 1.0, 1, 0)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    check_engine(drawn_as._replace(slots=8, cache_dtype="int8"), mesh)
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_engine(drawn_as._replace(**settings), mesh)

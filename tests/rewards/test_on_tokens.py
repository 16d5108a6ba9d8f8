import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import BUILTIN, build_rewards, score_all
from rlhf_jax.rewards.on_tokens import check_token_score, whole_texts
from rlhf_jax.rollout.logprobs import Transcript

P, N = 6, 7
TEXTS = [
    ("This phone is", " great and I love it"),
    ("The food was", " bad"),
    ("It", " works well"),
    ("The food was", " so good, but slow"),
    ("I", " hate it"),
    ("The sound is", " clear"),
    ("This phone", " died"),
    ("The staff", " are very kind"),
]
FINISHED = np.array([True, True, False, True, False, True, True, False])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUILTIN["builtin:reward"])


def transcript_of(tokenizer):
    """The texts as a sampler leaves them; EOS where a response is finished."""
    arrays = [np.zeros((8, size), int) for size in (P, P, N, N)]
    for row, ((prompt, response), finished) in enumerate(zip(TEXTS, FINISHED)):
        asked, said = tokenizer.encode(prompt), tokenizer.encode(response)
        assert asked + said == tokenizer.encode(prompt + response)
        said = said + [tokenizer.eos_token_id] * int(finished)
        prompts, prompt_mask, responses, mask = arrays
        prompts[row, P - len(asked) :], prompt_mask[row, P - len(asked) :] = asked, 1
        responses[row, : len(said)], mask[row, : len(said)] = said, 1
    prompts, prompt_mask, responses, mask = map(jnp.asarray, arrays)
    return Transcript(prompts, prompt_mask > 0, responses, mask > 0)


def test_whole_texts_by_hand():
    """Two tokens asked and one said, cut off; one asked and two said, EOS (9) last."""
    transcript = Transcript(
        jnp.array([[0, 4, 5], [0, 0, 4]]),
        jnp.array([[False, True, True], [False, False, True]]),
        jnp.array([[6, 0], [7, 9]]),
        jnp.array([[True, False], [True, True]]),
    )
    tokens, mask = whole_texts(transcript, jnp.array([False, True]), 9)
    real = [row[kept].tolist() for row, kept in zip(np.asarray(tokens), mask)]
    assert real == [[4, 5, 6, 9], [4, 7, 9]]
    assert mask.shape == (2, 6)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_score_is_that_of_the_text(tokenizer, normalize):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    entry = {"source": "builtin:reward", "on": "tokens", "normalize": normalize}
    (reward,) = build_rewards({"human": entry}, mesh=mesh)
    want, _ = score_all([reward], *zip(*TEXTS))
    rows = sharding.rows(mesh)
    given = sharding.to_devices((transcript_of(tokenizer), FINISHED), rows)
    got = reward.on_tokens.score(*given)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.std(want) > 0.1


def test_mistakes_are_sentences(tokenizer):
    mesh = sharding.make_mesh()

    def build(**entry):
        return build_rewards({"a": {"on": "tokens"} | entry}, mesh=mesh)[0]

    with pytest.raises(UserError, match='take "text" or "tokens"'):
        build(source="builtin:reward", on="ids")
    with pytest.raises(UserError, match="leave text and output out"):
        build(source="builtin:reward", text="{response}")
    scorer = build(source="builtin:reward").on_tokens
    check_token_score("a", scorer, tokenizer, scorer.longest - 1)
    with pytest.raises(UserError, match="lower prompt_tokens"):
        check_token_score("a", scorer, tokenizer, scorer.longest)
    other = scorer._replace(vocabulary={"a": 0})
    with pytest.raises(UserError, match="its tokenizer is not the policy's"):
        check_token_score("a", other, tokenizer, 8)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.rollout import packing
from rlhf_jax.rollout.logprobs import Transcript, score_responses

P, N = 6, 7
RESPONSES = np.array([7, 1, 2, 3, 1, 5, 2, 4])
STATIC = {"temperature": 0.7, "chunk_size": 3}


@pytest.fixture(scope="module")
def transcript(llama):
    rng = np.random.default_rng(1)
    mask = np.arange(N) < RESPONSES[:, None]
    responses = np.where(mask, rng.integers(3, 96, mask.shape), 1).astype(np.int32)
    arrays = llama.prompts, llama.prompt_mask, responses, mask
    return Transcript(*map(jnp.asarray, arrays))


@pytest.fixture(scope="module")
def grouped(transcript):
    """Two prompts, four responses to each."""
    prompts = lambda x: jnp.repeat(x[:2], 4, axis=0)
    return transcript._replace(
        prompts=prompts(transcript.prompts), prompt_mask=prompts(transcript.prompt_mask)
    )


def laid_out(transcript, group=1):
    whole = np.arange(8)[None, :]
    layout = packing.plan_transcript(transcript, whole, group=group)
    return jax.tree.map(lambda x: jnp.asarray(x[0]), layout)


def test_pack_by_hand():
    """Into rows of 10: 9 | 7 + 3 | 5 + 5 | 4, the longest first."""
    lengths = np.array([5, 9, 3, 5, 7, 4])
    assert packing.pack(lengths, 10) == [[1], [4, 2], [0, 3], [5]]


def test_into_a_given_number_of_rows_by_hand():
    """9 | 7 | 5 + 4 | 5 + 3, the longest first into the row with most room."""
    lengths = np.array([5, 9, 3, 5, 7, 4])
    assert packing.pack_evenly(lengths, 10, 4) == [[1], [4], [0, 5], [3, 2]]
    assert packing.pack_evenly(lengths, 10, 3) is None


def test_every_token_stands_once(transcript):
    """Prompt and response of each row, without the last token, in a segment."""
    layout = jax.device_get(laid_out(transcript))
    tokens = np.concatenate([transcript.prompts, transcript.responses], axis=1)
    real = np.concatenate([transcript.prompt_mask, transcript.mask], axis=1)
    wanted = sorted(tuple(row[kept][:-1].tolist()) for row, kept in zip(tokens, real))
    packed = np.asarray(packing.gather(layout, tokens))
    found = [
        tuple(row[numbers == segment].tolist())
        for row, numbers in zip(packed, layout.segments)
        for segment in range(1, numbers.max() + 1)
    ]
    assert sorted(found) == wanted
    assert len(layout.segments) < len(tokens)
    # A state stands right before its target, or is the prompt's last.
    said, spoken = packing.targets(layout, np.asarray(transcript.responses))
    assert spoken.sum() == RESPONSES.sum()
    places = layout.places[np.asarray(transcript.mask)]
    assert len(set(places.tolist())) == RESPONSES.sum()
    np.testing.assert_array_equal(
        np.asarray(said).ravel()[places],
        np.asarray(transcript.responses)[np.asarray(transcript.mask)],
    )


@pytest.mark.parametrize(("group", "most"), [(1, 12), (4, 16)])
def test_shapes_are_few(group, most):
    """Of 16 rows of any lengths: eighths, and a multiple of the shards."""
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        prompts = rng.integers(1, P + 1, 16 // group).repeat(group)
        responses = rng.integers(1, rng.integers(2, N + 2), 16)
        layout = packing.plan(
            packing.Spans(P - prompts, np.full(16, P), P + responses),
            np.arange(16)[None, :],
            width=P + N,
            responses=N,
            shards=2,
            prompts=np.arange(16) // group,
        )
        shapes.add((layout.tokens.shape[1:], layout.states.shape[2]))
        assert layout.tokens.shape[1] % 2 == 0
    assert 1 < len(shapes) <= most


def test_right_padded_rows_by_hand():
    """Rows of 5: a prompt of 2 with 2 tokens, and one of 1 with 1, share a row."""
    spans = packing.Spans(*map(np.array, ([0, 0], [2, 1], [4, 2])))
    layout = packing.plan(spans, np.array([[0, 1]]), width=5, responses=4, shards=1)
    assert layout.tokens[0].tolist() == [[0, 1, 2, 5, 0]]
    assert layout.segments[0].tolist() == [[1, 1, 1, 2, 0]]
    # Columns 1 and 2 predict the first response, and 3 the second.
    assert layout.states[0, 0, :3].tolist() == [1, 2, 3]
    # Of the last four columns of each: 2 and 3 of row 0, 1 of row 1.
    assert layout.targets[0, 0].tolist() == [1, 2, 4, -1]
    assert layout.places[0][0, 1:3].tolist() == [0, 1]
    assert layout.places[0][1, 0] == 2


def test_shared_prompts_take_no_more_places():
    """Prompts short and responses long: a pair together may pack worse than apart."""
    rng = np.random.default_rng(0)
    fewer = 0
    for _ in range(50):
        prompts = rng.integers(4, 11, 16).repeat(2)
        ends = prompts + rng.integers(10, 119, 32)
        spans = packing.Spans(np.zeros(32, int), prompts, ends)
        static = {"width": 128, "responses": 127, "shards": 2}
        batches = rng.permutation(32).reshape(2, 16)
        apart, shared = (
            packing.plan(spans, batches, prompts=numbers, **static)
            for numbers in (None, np.arange(32) // 2)
        )
        assert shared.tokens.size <= apart.tokens.size
        fewer += shared.tokens.size < apart.tokens.size
        real = np.zeros((2, 16), int)
        for batch, layout in enumerate(shared.targets):
            of_rows, counts = np.unique(layout[layout >= 0] // 127, return_counts=True)
            real[batch, of_rows] = counts
        np.testing.assert_array_equal(real, (ends - prompts)[batches])
    assert fewer > 0


def test_each_shard_has_its_part():
    """A group of 8 over 8 shards: not all of its responses fall to one of them."""
    spans = packing.Spans(*(np.full(16, x) for x in (0, 15, 17)))
    plan = lambda shards: packing.plan(
        *(spans, np.arange(16)[None, :]),
        width=17,
        responses=2,
        shards=shards,
        prompts=np.arange(16) // 8,
    )
    assert plan(1).tokens.shape == (1, 2, 32)  # 17 + 7 * 2, and even
    on_eight = plan(8)
    assert on_eight.tokens.shape == (1, 8, 17)
    assert ((on_eight.targets[0] >= 0).sum(axis=1) == 4).all()


def test_chunks_have_as_many_logits():
    """16 tokens of each of 8 rows, over one shard and over four; all at once."""
    shape = jax.ShapeDtypeStruct
    layout = packing.Layout(*[shape((1, 24), jnp.int32)] * 6)
    assert packing.chunk_size(layout, 16, 8) == 128
    of_four = layout._replace(states=shape((4, 24), jnp.int32))
    assert packing.chunk_size(of_four, 16, 8) == 32
    assert packing.chunk_size(layout, None, 8) is None
    assert packing.chunk_size(None, 16, 8) == 16


@pytest.mark.parametrize("spans", [([0], [0], [2]), ([0], [2], [2]), ([0], [1], [3])])
def test_what_cannot_be_laid_out(spans):
    """No token before the response, none in it, and one outside its columns."""
    with pytest.raises(ValueError, match="each response must have a token"):
        packing.plan(
            packing.Spans(*map(np.array, spans)),
            np.array([[0]]),
            width=4,
            responses=2,
            shards=1,
        )


def by_hand():
    """Prompts of 2 tokens: to one, responses of 2 and 1 tokens; to another, of 3."""
    return packing.plan(
        packing.Spans(*map(np.array, ([0, 0, 0], [2, 2, 2], [4, 5, 3]))),
        np.array([[0, 1, 2]]),
        width=5,
        responses=3,
        shards=1,
        prompts=np.array([7, 4, 7]),
    )


def test_a_shared_prompt_by_hand():
    layout = jax.tree.map(lambda x: x[0, 0].tolist(), by_hand())
    # Of row 0 its prompt and first token; of row 2, whose only token ends it, none.
    assert layout.tokens == [5, 6, 7, 8, 0, 1, 2, 0]
    assert layout.segments == [1, 1, 1, 1, 2, 2, 2, 0]
    assert layout.branches == [0, 0, 1, 1, 0, 0, 1, 0]
    # The prompt's last token predicts the first of both.
    assert layout.states == [1, 2, 3, 5, 6, 5]
    assert layout.targets == [3, 4, 5, 0, 1, 6]


def test_rows_as_wide_as_it_is_worth():
    """Prompts of 14, 4 responses of 6 to each: 38 tokens once, not 20 four times."""
    spans = packing.Spans(*(np.full(8, x) for x in (0, 14, 20)))
    alike = {"prompts": np.arange(8) // 4}
    whole = np.arange(8)[None, :]
    static = {"width": 20, "responses": 6, "shards": 1}
    shape = lambda *of, **how: packing.plan(*of, **static, **how).tokens.shape[1:]
    assert shape(spans, whole) == (8, 20)
    assert shape(spans, whole, **alike) == (2, 38)
    short = spans._replace(end=np.full(8, 15))
    assert shape(short, whole, **alike) == (2, 20)


def test_no_shared_prompts_on_tpus(monkeypatch):
    """Whose kernel knows segments alone."""
    monkeypatch.setattr(packing.backend, "on_tpu", lambda: True)
    assert by_hand().branches is None


def gradient(llama, transcript):
    def total(params):
        scored = score_responses(llama.model, params, transcript, **STATIC)
        weights = jnp.sin(jnp.arange(8 * N, dtype=jnp.float32)).reshape(8, N)
        return (weights * (scored.logprobs + 0.1 * scored.entropy)).sum(), scored

    return jax.jit(jax.grad(total, has_aux=True))(llama.params)


@pytest.mark.parametrize("group", [1, 4])
def test_scores_and_gradients_are_the_same(llama, transcript, grouped, group):
    transcript = grouped if group > 1 else transcript
    want_grad, want = gradient(llama, transcript)
    layout = laid_out(transcript, group)
    assert (layout.branches is None) == (group == 1)
    got_grad, got = gradient(llama, transcript._replace(layout=layout))
    assert got.hidden.shape[0] < want.hidden.shape[0]
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    np.testing.assert_allclose(got.entropy, want.entropy, atol=1e-5)
    assert not np.asarray(got.logprobs)[~np.asarray(transcript.mask)].any()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got_grad, want_grad
    )


@pytest.mark.parametrize("group", [1, 4])
def test_eight_devices_are_the_same(llama, transcript, grouped, group):
    transcript = grouped if group > 1 else transcript
    want = score_responses(llama.model, llama.params, transcript, **STATIC)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        layout = laid_out(transcript, group)
        rows = sharding.rows(mesh)
        on_mesh = sharding.to_devices(transcript._replace(layout=layout), rows)
        params = jax.tree.map(
            lambda x, at: sharding.to_devices(np.asarray(x), at),
            llama.params,
            sharding.param_shardings(llama.params, mesh),
        )
        score = jax.jit(score_responses, static_argnames=("model", *STATIC))
        got = score(llama.model, params, on_mesh, **STATIC)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)

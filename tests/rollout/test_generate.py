import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rlhf_jax import sharding
from rlhf_jax.rollout import Sampling, generate, sample_keys
from rlhf_jax.rollout.logprobs import Transcript, score_responses

N, PAD = 7, 0
GREEDY = Sampling(N, temperature=0.0, top_k=0, top_p=1.0, eos_id=-1, pad_id=PAD)
# An EOS that the model likes: some responses end, others do not.
WARM = GREEDY._replace(temperature=0.7, eos_id=19)
NUCLEUS = WARM._replace(top_k=30, top_p=0.9)

draw = jax.jit(generate, static_argnums=(0, 5))


def respond(llama, settings, *, rows=None, padding=0, mesh=None):
    """Samples the given rows of the batch, each under its own index."""
    rows = np.arange(len(llama.prompts)) if rows is None else np.asarray(rows)
    left = [(0, 0), (padding, 0)]
    prompts = np.pad(llama.prompts[rows], left, constant_values=9)
    mask = np.pad(llama.prompt_mask[rows], left)
    index, params = rows.astype(np.int32), llama.params
    if mesh is None:
        keys = sample_keys(jax.random.key(5), jnp.asarray(index))
        found = draw(llama.model, params, prompts, mask, keys, settings)
    else:
        with jax.set_mesh(mesh):
            params = jax.tree.map(
                lambda x, at: sharding.to_devices(np.asarray(x), at),
                params,
                sharding.param_shardings(params, mesh),
            )
            arrays = sharding.to_devices((prompts, mask, index), sharding.rows(mesh))
            keys = sample_keys(jax.random.key(5), arrays[2])
            found = draw(llama.model, params, *arrays[:2], keys, settings)
    return jax.device_get(found)


@pytest.fixture(scope="module")
def free(llama):
    """[B, N] greedy tokens when nothing ends a response."""
    return respond(llama, GREEDY).tokens


@pytest.fixture(scope="module")
def ended(llama, free):
    """The same with an EOS that row 0 says third."""
    return respond(llama, GREEDY._replace(eos_id=int(free[0, 2]), pad_id=5))


@pytest.fixture(scope="module")
def warm(llama):
    return respond(llama, WARM)


@functools.partial(jax.jit, static_argnums=0)
def last_logits(model, params, tokens, mask):
    hidden = model.apply(params, tokens, mask)
    return model.unembed(params, hidden[:, -1])


def test_greedy_is_a_repeated_argmax(llama):
    """A full forward pass for each token, over everything so far."""
    got = respond(llama, GREEDY)
    # One shape for all steps: what is yet to come is padding on the left.
    width = llama.prompts.shape[1] + N
    for step in range(N):
        tokens = np.concatenate([llama.prompts, got.tokens[:, :step]], axis=1)
        mask = np.pad(llama.prompt_mask, [(0, 0), (0, step)], constant_values=True)
        left = [(0, 0), (width - tokens.shape[1], 0)]
        logits = last_logits(
            llama.model, llama.params, np.pad(tokens, left), np.pad(mask, left)
        )
        np.testing.assert_array_equal(got.tokens[:, step], logits.argmax(-1))
    assert got.mask.all() and not got.finished.any()


def test_eos_ends_a_response(free, ended):
    got, eos = ended, int(free[0, 2])
    for row in range(len(free)):
        said = free[row].tolist()
        ends = said.index(eos) + 1 if eos in said else N
        assert got.tokens[row, :ends].tolist() == said[:ends]
        assert got.mask[row].tolist() == [True] * ends + [False] * (N - ends)
        assert (got.tokens[row, ends:] == 5).all()
        assert (got.logprobs[row, ends:] == 0).all()
        assert (got.logprobs[row, :ends] < 0).all()
        assert got.finished[row] == (eos in said)
    assert got.finished[0] and not got.finished.all()


def test_a_pad_that_is_eos_ends_nothing_early(llama, free, ended):
    """Many tokenizers fill with EOS; the mask, not the token, says what is real."""
    eos = int(free[0, 2])
    same = respond(llama, GREEDY._replace(eos_id=eos, pad_id=eos))
    np.testing.assert_array_equal(same.mask, ended.mask)
    np.testing.assert_array_equal(same.tokens, np.where(ended.mask, ended.tokens, eos))


def test_decoding_stops_when_every_row_is_done(llama, free, ended):
    """Row 0 alone ends after 3 of 7 tokens, and the loop with it."""
    decoded = []

    def decode(*args):
        jax.debug.callback(lambda: decoded.append(1))
        return llama.model.decode(*args)

    counting = llama._replace(model=llama.model._replace(decode=decode))
    settings = GREEDY._replace(eos_id=int(free[0, 2]), pad_id=5)
    alone = respond(counting, settings, rows=[0])
    jax.effects_barrier()
    assert alone.mask.sum() == 3
    assert len(decoded) == 2  # the first token needs none
    # In the whole batch, where other rows go on to the end, it is the same.
    assert ended.mask.all(1).any()
    for got, want in zip(alone, ended):
        np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def assert_same(got, want, rows=slice(None)):
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name)[rows])
    np.testing.assert_allclose(got.logprobs, want.logprobs[rows], atol=1e-5)


def test_some_responses_end_and_some_do_not(warm):
    """Else the comparisons below would show less."""
    assert 0 < warm.finished.mean() < 1
    assert len(np.unique(warm.mask.sum(1))) > 2


def test_row_by_row_is_the_same(llama, warm):
    for row in range(len(llama.prompts)):
        assert_same(respond(llama, WARM, rows=[row]), warm, [row])


def test_order_is_the_same(llama, warm):
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    assert_same(respond(llama, WARM, rows=order), warm, order)


def test_more_padding_is_the_same(llama, warm):
    assert_same(respond(llama, WARM, padding=5), warm)


def test_eight_devices_are_the_same(llama, warm):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert_same(respond(llama, WARM, mesh=mesh), warm)


def test_truncated_sampling_is_the_same_in_another_order(llama, warm):
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    whole = respond(llama, NUCLEUS)
    assert_same(respond(llama, NUCLEUS, rows=order), whole, order)
    assert (whole.tokens != warm.tokens).any()


def test_other_keys_draw_other_responses(llama, warm):
    keys = sample_keys(jax.random.key(4), jnp.arange(8))
    other = draw(
        llama.model, llama.params, llama.prompts, llama.prompt_mask, keys, WARM
    )
    assert (np.asarray(other.tokens) != warm.tokens).any(1).all()


def test_logprobs_are_those_of_a_fresh_forward(llama, warm):
    transcript = Transcript(
        llama.prompts, llama.prompt_mask, warm.tokens, jnp.asarray(warm.mask)
    )
    static = {"temperature": 0.7, "chunk_size": None}
    score = jax.jit(score_responses, static_argnames=("model", *static))
    scored = score(llama.model, llama.params, transcript, **static)
    np.testing.assert_allclose(warm.logprobs, scored.logprobs, atol=1e-5)
    assert (warm.logprobs[warm.mask] < 0).all()


def test_eos_in_the_last_place_counts_as_finished(llama, free):
    """With room for one token, row 0 says nothing but EOS."""
    first = free[:, 0]
    settings = GREEDY._replace(max_new_tokens=1, eos_id=int(first[0]))
    got = respond(llama, settings)
    np.testing.assert_array_equal(got.tokens[:, 0], first)
    np.testing.assert_array_equal(got.finished, first == first[0])
    assert got.mask.all()


def test_a_group_is_its_prompt_asked_again(llama):
    """Read once or read G times: the same responses, each from its own index."""
    group, rows = 3, len(llama.prompts)
    keys = sample_keys(jax.random.key(5), jnp.arange(group * rows))
    prompts, mask = jnp.asarray(llama.prompts), jnp.asarray(llama.prompt_mask)
    got = draw(llama.model, llama.params, prompts, mask, keys, WARM)
    asked = prompts.repeat(group, axis=0), mask.repeat(group, axis=0)
    expected = draw(llama.model, llama.params, *asked, keys, WARM)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)
    of_first = {tuple(row) for row in np.asarray(got.tokens[:group]).tolist()}
    assert len(of_first) > 1


# Fewer slots than requests: those whose response has ended take the next one.


@pytest.mark.parametrize("settings", [WARM, NUCLEUS], ids=["warm", "nucleus"])
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_fewer_slots_are_the_same(llama, slots, settings):
    refilled = respond(llama, settings._replace(slots=slots))
    assert_same(refilled, respond(llama, settings))


def test_refilling_decodes_less(llama):
    """Two slots: row by row the steps add up to half of all tokens, and a tail."""
    decoded = []

    def decode(*args):
        jax.debug.callback(lambda: decoded.append(1))
        return llama.model.decode(*args)

    counting = llama._replace(model=llama.model._replace(decode=decode))
    lengths = respond(counting, WARM._replace(slots=2)).mask.sum(1)
    jax.effects_barrier()
    # Each response of n tokens needs n - 1 steps of one slot.
    assert -(-(lengths - 1).sum() // 2) <= len(decoded)
    assert len(decoded) <= (lengths - 1).sum() // 2 + lengths.max() - 1
    pairs = lengths.reshape(-1, 2).max(axis=1) - 1
    assert len(decoded) < pairs.sum()


def test_slots_of_groups_on_eight_devices(llama):
    """Four queues of six requests and three slots each, heads over `tensor`."""
    group, rows = 3, len(llama.prompts)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    index = np.arange(group * rows, dtype=np.int32)
    settings = WARM._replace(slots=12)
    keys = sample_keys(jax.random.key(5), jnp.asarray(index))
    want = draw(
        llama.model, llama.params, llama.prompts, llama.prompt_mask, keys, settings
    )
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x, at: sharding.to_devices(np.asarray(x), at),
            llama.params,
            sharding.param_shardings(llama.params, mesh),
        )
        prompts, mask, index = sharding.to_devices(
            (llama.prompts, llama.prompt_mask, index), sharding.rows(mesh)
        )
        keys = sample_keys(jax.random.key(5), index)
        got = draw(llama.model, params, prompts, mask, keys, settings)
    assert_same(jax.device_get(got), jax.device_get(want))


def test_a_shard_that_is_done_waits_for_the_other(llama, free):
    """Two queues and a slot each; the first shard's responses are all of one token."""
    mesh = jax.make_mesh(
        (2, 1, 1),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:2],
    )
    eos = int(free[0, 0])
    long = int(np.flatnonzero((free != eos).all(axis=1))[0])
    rows = [0] * 4 + [long] * 4
    settings = GREEDY._replace(eos_id=eos)
    want = respond(llama, settings, rows=rows)
    got = respond(llama, settings._replace(slots=2), rows=rows, mesh=mesh)
    assert_same(got, want)
    assert want.mask.sum(1).tolist() == [1] * 4 + [N] * 4


def test_a_response_of_one_token_frees_its_slot(llama, free):
    """EOS as the first token of row 0, and room for one token only."""
    settings = GREEDY._replace(eos_id=int(free[0, 0]), slots=2)
    assert_same(respond(llama, settings), respond(llama, settings._replace(slots=0)))
    settings = settings._replace(max_new_tokens=1)
    assert_same(respond(llama, settings), respond(llama, settings._replace(slots=0)))


@pytest.mark.parametrize("slots", [0, 3])
def test_repetition_penalty_equals_a_forward_pass_a_token(llama, slots):
    penalty = 1.5
    got = respond(llama, GREEDY._replace(repetition_penalty=penalty, slots=slots))
    width = llama.prompts.shape[1] + N
    for step in range(N):
        tokens = np.concatenate([llama.prompts, got.tokens[:, :step]], axis=1)
        mask = np.pad(llama.prompt_mask, [(0, 0), (0, step)], constant_values=True)
        left = [(0, 0), (width - tokens.shape[1], 0)]
        logits = np.array(
            last_logits(
                llama.model, llama.params, np.pad(tokens, left), np.pad(mask, left)
            )
        )
        for row in range(len(tokens)):
            for token in set(tokens[row][mask[row]].tolist()):
                value = logits[row, token]
                logits[row, token] = value / penalty if value > 0 else value * penalty
        np.testing.assert_array_equal(got.tokens[:, step], logits.argmax(-1))
    assert (got.tokens != respond(llama, GREEDY).tokens).any()


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.05), ("int8", 0.15)])
def test_a_smaller_cache_is_nearly_the_same(llama, free, dtype, error):
    """The log-probabilities of the tokens that were drawn, by a full forward pass."""
    settings = WARM._replace(cache_dtype=dtype, slots=3)
    got = respond(llama, settings)
    transcript = Transcript(
        llama.prompts, llama.prompt_mask, got.tokens, jnp.asarray(got.mask)
    )
    static = {"temperature": 0.7, "chunk_size": None}
    score = jax.jit(score_responses, static_argnames=("model", *static))
    scored = score(llama.model, llama.params, transcript, **static)
    gap = np.abs(got.logprobs - scored.logprobs).max()
    assert 1e-5 < gap < error

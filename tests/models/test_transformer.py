import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.transformer import make_model
from tests.models.conftest import jitted

CONFIG = TransformerConfig(
    vocab_size=48,
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    max_positions=64,
    sliding_window=3,
    sliding_layers=(True, False, True),
    rope_local_theta=100.0,
    init_std=0.3,
)


@functools.cache
def model_and_params():
    """A model and random float32 parameters (drawing them in JAX takes longer)."""
    model, rng = jitted(CONFIG), np.random.default_rng(0)
    abstract = jax.eval_shape(model.init, jax.random.key(0))

    def draw(path, leaf):
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(middle, 0.3, leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, abstract)


def random_tokens(shape, seed=1):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape)


def test_prefill_and_decode_equal_the_full_forward(family):
    model, params = family.model, family.pretrained.params
    tokens, mask = family.arrays["tokens"][0], family.arrays["mask"][0]
    T, prompt = tokens.shape[1], 6  # one real token of the shorter row
    want = model.apply(params, tokens, mask)
    hidden, cache = model.prefill(
        params, tokens[:, :prompt], mask[:, :prompt], cache_length=T + 2
    )
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    real = mask[:, :prompt].astype(bool)
    close(np.asarray(hidden)[real], np.asarray(want)[:, :prompt][real])
    unstacked = model.unstack(params)
    for slot in range(prompt, T):
        hidden, cache = model.decode(unstacked, tokens[:, slot], cache, slot)
        close(hidden, want[:, slot])
        close(
            model.unembed(unstacked, hidden),
            model.unembed(params, want[:, slot]),
        )
    np.testing.assert_array_equal(cache.lengths, mask.sum(1))
    np.testing.assert_array_equal(cache.valid, np.pad(mask, ((0, 0), (0, 2))))


def test_what_stands_under_the_mask_does_not_matter(family):
    tokens, mask = family.arrays["tokens"], family.arrays["mask"]
    for side in range(2):
        other = np.where(mask[side], tokens[side], np.int32(10_000_000))
        results = [
            np.asarray(family.model.apply(family.pretrained.params, t, mask[side]))
            for t in (tokens[side], other)
        ]
        real = mask[side].astype(bool)
        np.testing.assert_array_equal(results[0][real], results[1][real])
        assert np.isfinite(results[1]).all()


def test_left_right_and_no_padding_agree():
    model, params = model_and_params()
    tokens = random_tokens((2, 4))
    ones = np.ones((2, 4), bool)
    want = model.apply(params, tokens, ones)
    for room in [(2, 0), (0, 2), (1, 1)]:
        pad = ((0, 0), room)
        got = model.apply(params, np.pad(tokens, pad), np.pad(ones, pad))
        np.testing.assert_allclose(got[:, room[0] : room[0] + 4], want, atol=1e-5)


def test_packed_segments_equal_separate_rows():
    model, params = model_and_params()
    lengths = (5, 1, 6)
    texts = [random_tokens((1, n), seed=n) for n in lengths]
    packed = np.concatenate([*texts, np.zeros((1, 2), int)], axis=1)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    got = model.apply(params, packed, segments)
    rows = np.concatenate([np.pad(t, ((0, 0), (0, 6 - t.shape[1]))) for t in texts])
    mask = np.arange(6)[None] < np.array(lengths)[:, None]
    want = np.asarray(model.apply(params, rows, mask))[mask]
    np.testing.assert_allclose(got[0, : sum(lengths)], want, atol=1e-5)


def test_branches_equal_separate_rows(family):
    """A stem of 4 tokens goes on in three ways, of 3, 1 and 5 tokens."""
    model, params = family.model, family.pretrained.params
    draw = lambda n, seed: random_tokens((1, n), seed=seed)
    stem, ways = draw(4, 9), [draw(n, n) for n in (3, 1, 5)]
    packed = np.concatenate([draw(2, 8), stem, *ways, draw(1, 7)], axis=1)
    segments = np.repeat([1, 2, 0], [2, 13, 1])[None]
    branches = np.repeat([0, 0, 1, 2, 3, 0], [2, 4, 3, 1, 5, 1])[None]
    got = model.apply(params, packed, segments, branches=branches)
    at = 2 + stem.shape[1]
    for way in ways:
        text = np.concatenate([stem, way], axis=1)
        want = model.apply(params, text, np.ones(text.shape, bool))
        alone = np.concatenate([got[:, 2:6], got[:, at : at + way.shape[1]]], axis=1)
        np.testing.assert_allclose(alone, want, atol=2e-5)
        at += way.shape[1]


def test_given_positions_are_used():
    model, params = model_and_params()
    tokens, mask = random_tokens((2, 6)), np.ones((2, 6), bool)
    base = model.apply(params, tokens, mask)
    places = np.tile(np.arange(6), (2, 1))
    same = model.apply(params, tokens, mask, positions=places)
    # Rotary positions are relative: a shift changes nothing, a stretch does.
    shifted = model.apply(params, tokens, mask, positions=9 + places)
    stretched = model.apply(params, tokens, mask, positions=2 * places)
    np.testing.assert_array_equal(base, same)
    np.testing.assert_allclose(base, shifted, atol=1e-5)
    assert np.abs(base - stretched).max() > 0.01


def test_no_token_sees_the_future_or_beyond_the_window():
    config = dataclasses.replace(CONFIG, sliding_layers=None)
    model, params = make_model(config), model_and_params()[1]

    def last(embedding, position):
        edited = {**params, "embed": {"tokens": embedding}}
        hidden = model.apply(edited, jnp.arange(12)[None], np.ones((1, 12), bool))
        return hidden[0, position].sum()

    gradient = jax.jit(jax.grad(last))(params["embed"]["tokens"], 8)
    seen = np.abs(gradient[:12]).sum(1) > 0
    # Three layers of window 3 reach 2·3 tokens back: 2..8.
    np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(2, 9))


def test_rows_of_padding_alone_are_finite_forward_and_backward():
    model, params = model_and_params()
    tokens = random_tokens((2, 6))
    mask = np.array([[0] * 6, [0, 0, 1, 1, 1, 1]], bool)

    def loss(params):
        hidden = model.apply(params, tokens, mask)
        return jnp.where(mask[..., None], jnp.square(hidden), 0).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all()


@functools.cache
def exact_gradient():
    return gradient(*model_and_params(), random_tokens((2, 6)))


def gradient(model, params, tokens):
    mask = np.ones(tokens.shape, bool)

    def loss(params):
        hidden = model.apply(params, tokens, mask).astype(jnp.float32)
        return jnp.square(model.unembed(params, hidden)).mean()

    return jax.jit(jax.grad(loss))(params)


def test_remat_changes_no_gradient():
    params, tokens = model_and_params()[1], random_tokens((2, 6))
    plain = exact_gradient()
    remat_model = make_model(CONFIG, remat=True)
    remat = gradient(remat_model, params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, remat)
    jaxpr = str(jax.make_jaxpr(lambda p: gradient(remat_model, p, tokens))(params))
    assert "remat" in jaxpr or "checkpoint" in jaxpr


def test_bfloat16_compute():
    model, params = model_and_params()
    low = jitted(CONFIG, dtype="bfloat16")
    tokens, mask = random_tokens((2, 6)), np.ones((2, 6), bool)
    hidden = low.apply(params, tokens, mask)
    assert hidden.dtype == jnp.bfloat16
    want = model.apply(params, tokens, mask)
    np.testing.assert_allclose(np.float32(hidden), want, atol=0.1)
    assert low.unembed(params, hidden).dtype == jnp.float32
    _, cache = low.prefill(params, tokens, mask, cache_length=8)
    assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}
    unstacked = low.unstack(params)
    matrices = {x.dtype for x in jax.tree.leaves(unstacked["layers"]) if x.ndim == 2}
    assert matrices == {jnp.dtype("bfloat16")}
    hidden, _ = low.decode(unstacked, tokens[:, 0], cache, 6)
    assert hidden.dtype == jnp.bfloat16
    exact, rough = exact_gradient(), gradient(low, params, tokens)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rough), strict=True):
        assert b.dtype == jnp.float32
        assert np.abs(a - b).max() < 0.06 * np.abs(a).max()


def test_jit_equals_eager():
    model, params = model_and_params()
    tokens, mask = random_tokens((2, 6)), np.ones((2, 6), bool)
    eager = make_model(CONFIG).apply(params, tokens, mask)
    np.testing.assert_allclose(model.apply(params, tokens, mask), eager, atol=1e-5)


def test_dropout_acts_only_with_a_key():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    model, params = make_model(config), model_and_params()[1]
    tokens, mask = random_tokens((2, 6)), np.ones((2, 6), bool)
    apply = functools.partial(jax.jit(model.apply), params, tokens, mask)
    want = model_and_params()[0].apply(params, tokens, mask)
    np.testing.assert_allclose(apply(), want, atol=1e-5)
    first = apply(dropout_key=jax.random.key(1))
    again = apply(dropout_key=jax.random.key(1))
    other = apply(dropout_key=jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - want).max() > 0.1
    assert np.abs(first - other).max() > 0.1


def test_dropout_reaches_the_embedding():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    model, params = jitted(config), model_and_params()[1]
    tokens, mask = random_tokens((2, 6)), np.ones((2, 6), bool)

    def silence(path, leaf):
        branch_ends = ("attention/out/kernel", "mlp/down/kernel")
        is_end = sharding.path_string(path).endswith(branch_ends)
        return jnp.zeros_like(leaf) if is_end else leaf

    params = jax.tree_util.tree_map_with_path(silence, params)
    first = model.apply(params, tokens, mask, dropout_key=jax.random.key(1))
    other = model.apply(params, tokens, mask, dropout_key=jax.random.key(2))
    assert np.abs(first - other).max() > 0.1


def test_fresh_parameters():
    config = dataclasses.replace(CONFIG, d_model=64, init_std=0.02)
    model = jitted(config)
    params = model.init(jax.random.key(0))
    assert params["layers"]["attention"]["query"]["kernel"].shape == (3, 64, 32)
    assert params["layers"]["attention"]["key"]["kernel"].shape == (3, 64, 16)
    assert params["layers"]["attention"]["out"]["kernel"].shape == (3, 32, 64)
    assert params["layers"]["mlp"]["down"]["kernel"].shape == (3, 24, 64)
    assert params["unembed"]["kernel"].shape == (48, 64)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    up = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(up.std(axis=(1, 2)), 0.02, rtol=0.1)
    assert np.abs(up[0] - up[1]).max() > 0.01  # no two layers alike
    # Residual branches start smaller: 0.02 / √(2·3).
    down = np.asarray(params["layers"]["mlp"]["down"]["kernel"])
    np.testing.assert_allclose(down.std(), 0.02 / 6**0.5, rtol=0.1)
    tied = make_model(dataclasses.replace(config, tied_embeddings=True))
    assert "unembed" not in jax.eval_shape(tied.init, jax.random.key(0))


def test_the_scalar_head():
    config = dataclasses.replace(CONFIG, d_model=255)
    model = jitted(config)
    params = model.init(jax.random.key(0), head=True)
    assert "unembed" not in params
    kernel = params["score"]["kernel"]
    assert kernel.shape == (255, 1)
    # 1/√(255 + 1) = 1/16
    np.testing.assert_allclose(np.std(kernel), 1 / 16, rtol=0.15)
    hidden = np.random.default_rng(0).normal(size=(2, 3, 255)).astype(np.float32)
    scores = model.score(params, hidden)
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scores, hidden @ np.asarray(kernel)[:, 0], atol=1e-5)
    assert model.score(params, jnp.asarray(hidden, jnp.bfloat16)).dtype == jnp.float32


def test_unembedding_is_the_matrix_of_unembed():
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tied_embeddings=tied, logit_softcap=2.0)
        model, params = make_model(config), model_and_params()[1]
        hidden = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
        raw = hidden @ np.asarray(model.unembedding(params)).T
        np.testing.assert_allclose(
            model.unembed(params, hidden), 2 * np.tanh(raw / 2), atol=1e-5
        )


def test_decode_updates_a_donated_cache_in_place():
    model, params = model_and_params()
    tokens = random_tokens((2, 4))
    _, cache = model.prefill(params, tokens, np.ones((2, 4), bool), cache_length=32)
    step = jax.jit(make_model(CONFIG).decode, donate_argnums=2)
    program = step.lower(model.unstack(params), tokens[:, 0], cache, 4).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    assert program.memory_analysis().alias_size_in_bytes >= held


def test_a_mesh_changes_nothing_but_round_off():
    model, params = model_and_params()
    tokens, mask = random_tokens((8, 6)), np.ones((8, 6), bool)
    mask[::2, :2] = False

    def run(params, tokens, mask):
        hidden, cache = model.prefill(params, tokens, mask, cache_length=8)
        unstacked = model.unstack(params)
        last, _ = model.decode(unstacked, tokens[:, 0], cache, 6)
        return hidden, last

    want = jax.jit(run)(params, tokens, mask)
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    rows = sharding.rows(mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(placed, *jax.device_put((tokens, mask), rows))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)

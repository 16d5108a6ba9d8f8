import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.rollout import sampling

TINY = float(np.finfo(np.float32).tiny)


def random_logits(rows=64, vocabulary=300, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.geomspace(0.1, 30.0, rows)[:, None]  # flat rows to peaked ones
    return (spread * rng.normal(size=(rows, vocabulary))).astype(np.float32)


def kept(logits, **settings):
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    weigh = jax.jit(lambda x: sampling.weigh(x, **settings))
    got = np.asarray(weigh(jnp.asarray(logits)))
    relative = softmax(logits)
    relative /= relative.max(axis=-1, keepdims=True)
    np.testing.assert_allclose(got[got > 0], relative[got > 0], rtol=1e-5)
    return got > 0


def assert_kept(got, want, logits):
    """The tokens that are kept, but for those too unlikely to have a weight at all."""
    relative = softmax(logits)
    relative /= relative.max(axis=-1, keepdims=True)
    seen = relative > 1e-37
    np.testing.assert_array_equal(got[seen], want[seen])
    assert not (got & ~want).any()


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_threshold_by_hand():
    """Weights from the top: 4 → 0.5, 3 → 0.8, 2 and 2 → 1.0."""
    logits = jnp.float32([[2.0, 4.0, 2.0, 3.0]])
    weights = jnp.float32([[0.1, 0.5, 0.1, 0.3]])
    for target, want in ((0.5, 4.0), (0.51, 3.0), (0.8, 3.0), (0.81, 2.0), (1.0, 2.0)):
        got = sampling.truncation_threshold(logits, weights, jnp.float32([target]))
        np.testing.assert_array_equal(got, [want])


@pytest.mark.parametrize("top_k", [1, 2, 17, 299])
def test_top_k_equals_a_sort(top_k):
    logits = random_logits()
    want = logits >= np.sort(logits, axis=-1)[:, -top_k, None]
    assert (want.sum(-1) == top_k).all()
    assert_kept(kept(logits, top_k=top_k), want, logits)


@pytest.mark.parametrize("outlier", [-1e9, float(np.finfo(np.float32).min), -np.inf])
def test_top_k_beside_a_token_that_is_ruled_out(outlier):
    """The threshold is exact however wide the range of the logits is."""
    logits = random_logits()
    logits[:, 7] = outlier
    want = logits >= np.sort(logits, axis=-1)[:, -10, None]
    assert_kept(kept(logits, top_k=10), want, logits)


def test_top_k_keeps_all_ties():
    logits = np.float32(
        [[1, 5, 3, 3, 3, 0], [2, 2, 2, 2, 2, 2], [-1, -3, 0, -0.0, -2, -2]]
    )
    want = np.array([[0, 1, 1, 1, 1, 0], [1] * 6, [0, 0, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(kept(logits, top_k=2), want)


@pytest.mark.parametrize("top_k", [0, 300, 1000])
def test_a_top_k_that_keeps_all(top_k):
    logits = random_logits()
    assert_kept(kept(logits, top_k=top_k), np.ones(logits.shape, bool), logits)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set_that_holds_p(top_p):
    """By a sort in float64; a row whose border lies within rounding is left out."""
    logits = random_logits(rows=200)
    got = kept(logits, top_p=top_p)
    compared = 0
    for row in range(len(logits)):
        order = np.argsort(-logits[row], kind="stable")
        cumulative = np.cumsum(softmax(logits[row])[order])
        if np.abs(cumulative - top_p).min() < 1e-6:
            continue
        want = np.zeros(logits.shape[1], bool)
        want[order[: np.argmax(cumulative >= top_p) + 1]] = True
        assert_kept(got[row], want, logits[row])
        compared += 1
    assert compared > 150


def test_a_nucleus_of_the_likeliest_alone():
    """Its neighbour in float32 is not a tie."""
    logits = np.float32([[0.0, -6e-8, -0.5, -3.0]])
    assert kept(logits, top_p=0.2)[0].tolist() == [True, False, False, False]


def test_top_p_keeps_all_ties():
    """p = 0.4, 0.2, 0.2, 0.2: half needs one of the three equals, so all of them."""
    logits = np.log(np.float32([[0.2, 0.4, 0.2, 0.2]]))
    got = [kept(logits, top_p=p)[0].tolist() for p in (0.3, 0.5)]
    assert got == [[False, True, False, False], [True] * 4]


def test_top_p_counts_what_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 two are kept: 0.4 is 0.57 of them, enough for 0.55."""
    logits = np.log(np.float32([[0.1, 0.2, 0.3, 0.4]]))
    assert kept(logits, top_k=2, top_p=0.55)[0].tolist() == [False] * 3 + [True]
    assert kept(logits, top_k=2, top_p=0.6)[0].tolist() == [False] * 2 + [True] * 2


def pick(weights, uniform):
    return np.asarray(jax.jit(sampling.draw_token)(weights, jnp.float32(uniform)))


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_a_draw_equals_a_loop(vocabulary):
    """The block by its cumulative weight, then the first of exponential arrivals."""
    rng = np.random.default_rng(vocabulary)
    rows, K = 200, sampling.BLOCK
    weights = rng.random((rows, vocabulary)).astype(np.float32)
    uniform = rng.random((rows, 1 + K)).astype(np.float32)
    got, same = pick(weights, uniform), 0
    for row in range(rows):
        w, u = weights[row].astype(np.float64), uniform[row].astype(np.float64)
        borders = np.add.reduceat(w, np.arange(0, vocabulary, K)).cumsum()
        block = int(np.argmax(borders > u[0] * borders[-1]))
        inside = w[block * K : (block + 1) * K]
        arrivals = -np.log(1 - u[1 : 1 + len(inside)]) / inside
        same += got[row] == block * K + np.argmin(arrivals)
    assert same >= rows - 1  # a number on a border may be rounded to either side


def test_a_rounding_error_hardly_changes_a_draw():
    """A cumulative sum alone would change some 40 of 50,000 draws among 8,192."""
    rng = np.random.default_rng(0)
    rows = 10_000
    logits = rng.normal(size=8192).astype(np.float32)
    noise = np.float32(1 + 1e-6 * rng.normal(size=8192))
    changed = 0
    for _ in range(5):
        uniform = rng.random((rows, 1 + sampling.BLOCK)).astype(np.float32)
        whole = lambda x: np.broadcast_to(np.exp(x), (rows, 8192))
        before, after = (
            pick(whole(logits), uniform),
            pick(whole(logits * noise), uniform),
        )
        changed += (before != after).sum()
    assert changed <= 3


def test_never_a_token_of_weight_zero():
    """Numbers on and beside every border, of sparse weights with empty blocks."""
    rng = np.random.default_rng(0)
    vocabulary = 3000
    for trial in range(6):
        weights = rng.random(vocabulary) * (rng.random(vocabulary) < 0.03)
        empty = rng.integers(0, vocabulary // sampling.BLOCK + 1, 4)
        for block in (0, *empty[: trial + 1]):
            weights[block * sampling.BLOCK : (block + 1) * sampling.BLOCK] = 0
        weights = weights.astype(np.float32)
        borders = np.cumsum(weights.astype(np.float64))
        borders = np.unique((borders / borders[-1]).astype(np.float32))
        first = np.concatenate(
            [borders, np.nextafter(borders, 2), np.nextafter(borders, -1), [0, TINY]]
        ).astype(np.float32)
        first = np.resize(np.clip(first, 0, 1 - 2.0**-24).astype(np.float32), 400)
        assert weights.any() and first.max() < 1
        # Of the other numbers many are the smallest that there is, zero.
        uniform = rng.random((400, 1 + sampling.BLOCK)).astype(np.float32)
        uniform *= rng.random(uniform.shape) < 0.5
        uniform[:, 0] = first
        tokens = pick(np.broadcast_to(weights, (400, vocabulary)), uniform)
        assert (weights[tokens] > 0).all()


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.9])
def test_min_p_is_a_share_of_the_likeliest(min_p):
    logits = random_logits()
    probs = softmax(logits)
    want = probs >= min_p * probs.max(-1, keepdims=True)
    assert len(want) < want.sum() < want.size
    np.testing.assert_array_equal(kept(logits, min_p=min_p), want)


def test_min_p_of_what_the_nucleus_left():
    """Of 0.5, 0.3, 0.15 and 0.05 top-p 0.7 keeps two, and min-p 0.7 one of those."""
    logits = np.log(np.float32([[0.3, 0.05, 0.5, 0.15]]))
    assert kept(logits, top_p=0.7)[0].tolist() == [True, False, True, False]
    assert kept(logits, top_p=0.7, min_p=0.7)[0].tolist() == [False, False, True, False]


def test_repetition_penalty_equals_a_loop():
    logits, vocabulary = random_logits(3), 300
    tokens = np.array([[5, 7, 7, 9], [1, 2, 3, 4], [8, 8, 8, 299]])
    mask = np.array([[False, True, True, True], [True] * 4, [False, True, True, False]])
    seen = sampling.tokens_in(jnp.asarray(tokens), jnp.asarray(mask), vocabulary)
    seen = sampling.add_token(seen, jnp.array([0, 2, 6]))
    want = logits.copy()
    for row, said in enumerate(({7, 9, 0}, {1, 2, 3, 4}, {8, 6})):
        assert set(np.flatnonzero(seen[row])) == said
        for token in said:
            value = logits[row, token]
            want[row, token] = value / 1.3 if value > 0 else value * 1.3
    got = sampling.penalize(jnp.asarray(logits), seen, 1.3)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (np.asarray(got) <= logits).all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (1.3, 12, 0.8, 0.0),
        (1.3, 0, 1.0, 0.1),
    ],
)
def test_frequencies_match_the_distribution(temperature, top_k, top_p, min_p):
    """Chi-square over 50,000 draws through keys, as `generate` makes them."""
    draws = 50_000
    logits = random_logits(1, 20, seed=5)[0] * 20

    @jax.jit
    def draw(key):
        keys = sampling.sample_keys(key, jnp.arange(draws))
        return sampling.sample(
            jnp.broadcast_to(logits, (draws, 20)),
            sampling.uniforms(keys, jnp.full(draws, 3)),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )

    tokens, logprobs = draw(jax.random.key(11))
    settings = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    inside = kept(logits[None] / temperature, **settings)[0]
    probs = softmax(np.where(inside, logits / temperature, -np.inf))
    counts = np.bincount(tokens, minlength=20)
    assert counts[~inside].sum() == 0
    enough = probs * draws > 5
    expected = np.append(probs[enough], probs[inside & ~enough].sum()) * draws
    observed = np.append(counts[enough], counts[inside & ~enough].sum())
    expected, observed = expected[expected > 0], observed[expected > 0]
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # The log-probability is that of the distribution drawn from.
    np.testing.assert_allclose(logprobs, np.log(probs[tokens]), rtol=1e-4, atol=1e-5)


def test_greedy_takes_the_likeliest_token():
    logits = random_logits()
    ignored = {"top_k": 3, "top_p": 0.5, "min_p": 0.3}
    uniform = jnp.full((len(logits), 1 + sampling.BLOCK), 0.99)
    tokens, logprobs = sampling.sample(
        jnp.asarray(logits), uniform, temperature=0, **ignored
    )
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(
        logprobs, np.log(softmax(logits).max(-1)), rtol=1e-4, atol=1e-5
    )


def test_bfloat16_logits_give_float32():
    logits = jnp.asarray(random_logits(), jnp.bfloat16)
    uniform = jnp.full((len(logits), 1 + sampling.BLOCK), 0.5)
    tokens, logprobs = sampling.sample(
        logits, uniform, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1
    )
    assert tokens.dtype == jnp.int32
    assert logprobs.dtype == jnp.float32


def test_keys_are_functions_of_the_index_alone():
    root = jax.random.key(0)
    step = jnp.array([2, 2, 0, 5, 2, 2, 7, 2])
    whole = sampling.uniforms(sampling.sample_keys(root, jnp.arange(8)), step)
    picked = jnp.array([6, 1])
    some = sampling.uniforms(sampling.sample_keys(root, picked), step[picked])
    np.testing.assert_array_equal(some, whole[picked])
    assert whole.shape == (8, 1 + sampling.BLOCK)
    assert len(np.unique(whole)) == whole.size
    later = sampling.uniforms(sampling.sample_keys(root, jnp.arange(8)), step + 1)
    assert not np.isin(later, whole).any()
    assert (whole >= 0).all() and (whole < 1).all()

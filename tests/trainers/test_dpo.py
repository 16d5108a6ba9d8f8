"""DPO: TRL's steps, micro-batches, what it reports, and its settings."""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.dpo import get_config
from rlhf_jax import loading, sharding
from rlhf_jax.data.pairs import encode_pairs
from rlhf_jax.data.preferences import Pair
from rlhf_jax.errors import UserError
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.trainers import dpo, offline
from tests.trainers.one_phase import single_mesh

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama"
CASES = ("sigmoid", "mix", "weighted")

pytestmark = pytest.mark.usefixtures("run")  # which makes XLA quick


@functools.cache
def saved() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "dpo_step.npz") as arrays:
        return dict(arrays)


def make_config(case="sigmoid", **changes):
    """The fixture's settings of a case, and `changes` with `__` in place of dots."""
    config = get_config()
    config.model = str(SOURCE)
    settings = json.loads(str(saved()["settings"]))
    settings |= json.loads(str(saved()["cases"]))[case]
    return change(
        config, settings | {n.replace("__", "."): v for n, v in changes.items()}
    )


def change(config, settings):
    settings = dict(settings)
    config.dpo.loss_types.update(settings.pop("dpo.loss_types", {}))
    config.update_from_flattened_dict(settings)
    return config


def trl_batch():
    """TRL's batch as ours: its chosen rows come first, then the rejected ones."""
    names = ("input_ids", "attention_mask", "completion_mask")
    tokens, mask, response = (
        np.stack(np.split(saved()[name], 2), axis=1) for name in names
    )
    zeros = np.zeros((len(tokens), 2), np.float32)
    return dpo.Pairs(tokens, mask.astype(bool), response.astype(bool), zeros)


def test_pairs_share_a_prompt_that_is_the_same():
    """Of three pairs the second has another first token on one side."""
    tokens = np.tile(np.arange(3, 9, dtype=np.int32), (1, 3, 2, 1))
    tokens[0, 1, 1, 0] = 20
    response = np.arange(6) >= np.full((1, 3, 2, 1), 4)
    pairs = dpo.Pairs(tokens, np.ones_like(response), response, np.zeros((1, 3, 2)))
    with jax.set_mesh(single_mesh()):
        layout = dpo.lay_out(pairs, accumulation=1).layout
    of_pairs = layout.tokens[layout.branches == 2] // 12
    assert sorted(of_pairs.tolist()) == [0, 2]


def make_setup(config, mesh):
    """The loaded policy, and the batch with the reference's log-probabilities."""
    policy = loading.load_model(config.model, config, mesh)
    reference = jax.tree.map(jnp.copy, policy.params)
    reference["unembed"]["kernel"] *= saved()["unembedding_scale"]
    score = jax.jit(functools.partial(dpo.response_logprobs, policy.model, config))
    pairs = sharding.to_devices(trl_batch(), sharding.rows(mesh))
    return policy, pairs._replace(ref_logprobs=score(reference, pairs).logprobs.T)


def take_steps(config, mesh, steps=2):
    """The metrics of each step on the fixture's batch, and the weights in the end."""
    with jax.set_mesh(mesh):
        policy, pairs = make_setup(config, mesh)
        state, optimizer = offline.make_state(config, policy.params, mesh)
        update = offline.make_update(
            dpo.make_loss(policy.model, config),
            optimizer,
            accumulation=config.learning.accumulation,
            counts=dpo.count,
        )
        batches = jax.tree.map(lambda x: x[None], pairs)
        if config.learning.packing:
            batches = dpo.lay_out(
                jax.device_get(batches), accumulation=config.learning.accumulation
            )
            # Of the whole batch no fewer rows are needed with shared prompts.
            shared = batches.layout.branches is not None
            assert shared == (config.learning.accumulation == 2)
        metrics = []
        for step in range(steps):
            state, found = update(state, batches, jax.random.key(step))
            metrics.append({k: float(v) for k, v in found.items()})
    return metrics, jax.device_get(state.policy)


def trl_weights(case, mesh):
    """TRL's weights after its steps, through the loader."""
    prefix = f"{case}/weights/"
    weights = {
        name.removeprefix(prefix): x
        for name, x in saved().items()
        if name.startswith(prefix)
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/model.safetensors")
        config = (SOURCE / "config.json").read_text("utf-8")
        pathlib.Path(folder, "config.json").write_text(config, "utf-8")
        return jax.device_get(load_pretrained(folder, mesh=mesh).params)


# the step, against TRL


@pytest.mark.parametrize(
    ("accumulation", "packing"), [(1, False), (2, False), (1, True), (2, True)]
)
@pytest.mark.parametrize("case", CASES)
def test_two_steps_of_trl(case, accumulation, packing):
    """The same losses, and the same weights after Adam's second step."""
    mesh = single_mesh()
    settings = {"accumulation": accumulation, "packing": packing}
    settings = {f"learning__{name}": value for name, value in settings.items()}
    config = make_config(case, **settings)
    metrics, params = take_steps(config, mesh)
    losses = [step["loss"] for step in metrics]
    np.testing.assert_allclose(losses, saved()[f"{case}/losses"], rtol=1e-5)
    expected = trl_weights(case, mesh)
    before = jax.device_get(load_pretrained(SOURCE, mesh=mesh).params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, expected)
    assert min(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4),
        params,
        expected,
    )


def test_the_encoding_of_trl():
    """Its own tokens of the same texts, in any order of the rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(json.loads(str(saved()["words"])))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    texts = json.loads(str(saved()["texts"]))
    pairs = [Pair(**row, probability=1.0, domain="") for row in texts]
    theirs = trl_batch()
    ours = encode_pairs(tokenizer, pairs, length=theirs.tokens.shape[2])
    rows = lambda x: sorted(zip(*(y.tolist() for y in x[:3])))
    assert rows(ours) == rows(theirs)


# micro-batches and meshes


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_the_whole_batch(case):
    """Responses differ in length, so that a mean of means would not do."""
    # With Adam's own eps a gradient of zero is as large a step as any other.
    plain = {"optimizer__eps": 1.0, "optimizer__lr": 1.0}
    whole, expected = take_steps(make_config(case, **plain), single_mesh(), steps=1)
    config = make_config(case, **plain, learning__accumulation=4)
    parts, params = take_steps(config, single_mesh(), steps=1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6),
        params,
        expected,
    )


# what is measured


def measured(config):
    with jax.set_mesh(single_mesh()):
        policy, pairs = make_setup(config, single_mesh())
        score = functools.partial(dpo.response_logprobs, policy.model, config)
        loss = dpo.make_loss(policy.model, config)
        _, metrics = jax.jit(loss)(policy.params, pairs, None, dpo.count(pairs))
        return jax.device_get((pairs, jax.jit(score)(policy.params, pairs), metrics))


def test_rewards_and_log_probabilities_by_numpy():
    pairs, scored, metrics = measured(make_config())
    w, l = scored.logprobs  # noqa: E741
    rewards = 0.3 * (scored.logprobs - pairs.ref_logprobs.T)
    tokens = pairs.response.sum(axis=(0, 2))
    expected = {
        "loss": np.mean(np.log1p(np.exp(rewards[1] - rewards[0]))),
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margin": (rewards[0] - rewards[1]).mean(),
        "rewards/accuracy": (rewards[0] > rewards[1]).mean(),
        "logps/chosen": w.mean(),
        "logps/rejected": l.mean(),
        "logps/chosen_token": w.sum() / tokens[0],
        "logps/rejected_token": l.sum() / tokens[1],
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_a_response_alone_has_the_log_probability_it_has_in_the_batch():
    """Neither the prompt's tokens nor padding nor the other side are in it."""
    config, mesh = make_config(), single_mesh()
    with jax.set_mesh(mesh):
        policy, pairs = make_setup(config, mesh)
        model, params = policy.model, policy.params
        score = jax.jit(functools.partial(dpo.response_logprobs, model, config))
        found = score(params, pairs).logprobs
        for row, side in ((0, 0), (1, 1)):
            real = np.asarray(pairs.mask[row, side])
            ids = np.asarray(pairs.tokens[row, side])[real][None]
            hidden = jax.jit(model.apply)(params, ids, np.ones_like(ids, bool))
            logits = np.asarray(hidden @ model.unembedding(params).T)[0]
            logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            said = np.flatnonzero(pairs.response[row, side])
            expected = sum(logprobs[t - 1, ids[0, t]] for t in said)
            np.testing.assert_allclose(found[side, row], expected, rtol=1e-4)


def test_padding_may_hold_anything():
    config, mesh = make_config(), single_mesh()
    with jax.set_mesh(mesh):
        policy, pairs = make_setup(config, mesh)
        score = jax.jit(functools.partial(dpo.response_logprobs, policy.model, config))
        other = pairs._replace(tokens=jnp.where(pairs.mask, pairs.tokens, 77))
        np.testing.assert_array_equal(
            score(policy.params, pairs).logprobs, score(policy.params, other).logprobs
        )


# settings


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dpo.loss_type": "sigmoit"}, "config.dpo.loss_type is 'sigmoit', expected"),
        ({"dpo.beta": 0.0}, "config.dpo.beta is 0.0, expected"),
        (
            {"dpo.loss_type": "hinge", "dpo.label_smoothing": 0.1},
            "config.dpo.label_smoothing is 0.1, expected 0 with loss_type 'hinge'",
        ),
        ({"dpo.loss_type": "exo_pair"}, "config.dpo.label_smoothing is 0.0, expected"),
        (
            {"dpo.loss_type": "nca_pair", "dpo.divergence": "js"},
            "config.dpo.divergence is 'js', expected 'reverse_kl' with",
        ),
        ({"dpo.divergence": "alpha"}, "config.dpo.alpha is None, expected a number"),
        ({"dpo.alpha": 0.5}, "config.dpo.alpha is 0.5, expected None"),
        ({"dpo.tau": 0.05}, "config.dpo.tau is 0.05, expected None with"),
        ({"dpo.loss_type": "discopop"}, "config.dpo.tau is None, expected a number"),
        (
            {"dpo.loss_types": {"bco_pair": 0.5, "hinge": 0.5}, "dpo.tau": 0.1},
            "config.dpo.tau is 0.1",
        ),
        ({"dpo.loss_types": {"hinge": 0.0}}, "config.dpo.loss_types.hinge=0.0 must be"),
        ({"dpo.loss_type": "aot", "dpo.wpo": True}, "config.dpo.wpo is True, expected"),
        ({"dpo.ld_alpha": 1.5}, "config.dpo.ld_alpha=1.5 must be in 0..1"),
        ({"dpo.rpo_alpha": -1.0}, "config.dpo.rpo_alpha=-1.0 must be at least 0"),
        ({"learning.accumulation": 3}, "config.learning.batch=32 must be a multiple"),
        (
            {"dpo.loss_type": "aot", "learning.accumulation": 2},
            "config.learning.accumulation=2 cannot go with the loss type 'aot'",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, sentence):
    with pytest.raises(UserError) as caught:
        dpo.validate(change(get_config(), settings), single_mesh())
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_goes_to_the_types_of_a_mix_that_have_it():
    config = get_config()
    config.dpo.loss_types.update({"sigmoid": 0.8, "bco_pair": 0.2, "discopop": 0.1})
    config.dpo.update({"label_smoothing": 0.1, "tau": 0.05, "divergence": "js"})
    dpo.validate(config, single_mesh())
    options = {kind: given for kind, (_, given) in dpo.loss_types(config.dpo).items()}
    js = {"divergence": "js", "alpha": None}
    assert options == {
        "sigmoid": {"label_smoothing": 0.1, **js},
        "bco_pair": {},
        "discopop": {"tau": 0.05, **js},
    }

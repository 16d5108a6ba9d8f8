"""The loss of supervised fine-tuning on rows, however the texts are laid out."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.sft import get_config
from rlhf_jax import loading
from rlhf_jax.data.packing import Rows, Text, encode_completions, pack_rows, pad_rows
from rlhf_jax.data.rows import Completion
from rlhf_jax.errors import UserError
from rlhf_jax.models import forward
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.models.transformer import make_model
from rlhf_jax.progress import make_console
from rlhf_jax.sharding import make_mesh
from rlhf_jax.trainers import offline, sft
from tests.trainers.one_phase import single_mesh
from tests.trainers.runs import assert_same_training, metrics_of

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama"
SHAPE = TransformerConfig(
    vocab_size=50,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_ff=32,
    max_positions=64,
    init_std=0.3,
)
LENGTHS = (5, 9, 3, 12, 7, 4, 2, 6)


@pytest.fixture(scope="module")
def params():
    return jax.jit(make_model(SHAPE).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [
        Text(rng.integers(0, 50, n).astype(np.int32), (np.arange(n) > 0))
        for n in LENGTHS
    ]


def loss_and_gradient(params, rows, *, model=None, key=0, **learning):
    model, config = model or make_model(SHAPE), get_config()
    config.learning.update(learning)
    loss = sft.make_loss(model, config)
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, rows, jax.random.key(key), sft.count_learned(rows)
    )
    return float(value), gradient


def assert_same_tree(one, other, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), one, other)


def test_packed_texts_are_read_as_if_each_stood_alone(params, texts):
    padded = pad_rows(texts, length=12, pad=0)
    packed = pack_rows(texts, length=16, pad=0)
    assert len(packed.tokens) < len(padded.tokens)
    expected, slope = loss_and_gradient(params, padded)
    got, gradient = loss_and_gradient(params, packed)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert_same_tree(gradient, slope)


def test_the_loss_is_the_mean_over_learned_tokens(params, texts):
    """By a loop over the texts, each in a row of its own, from plain logits."""
    model, total, count = make_model(SHAPE), 0.0, 0
    for tokens, learned in texts:
        hidden = model.apply(params, tokens[None], np.ones((1, len(tokens)), bool))
        logits = np.asarray(model.unembed(params, hidden)[0], np.float64)
        for t in range(1, len(tokens)):
            if learned[t]:
                likely = logits[t - 1] - np.log(np.exp(logits[t - 1]).sum())
                total, count = total - likely[tokens[t]], count + 1
    got, _ = loss_and_gradient(params, pad_rows(texts, length=12, pad=0))
    np.testing.assert_allclose(got, total / count, rtol=1e-5)


def test_what_is_not_learned_has_no_part_in_the_loss(params, texts):
    rows = pad_rows(texts, length=12, pad=0)
    none = rows._replace(learned=rows.learned & (np.arange(len(texts)) > 3)[:, None])
    expected, _ = loss_and_gradient(params, Rows(*(x[4:] for x in rows)))
    got, _ = loss_and_gradient(params, none)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_dft_weighs_each_token_by_its_probability(params, texts):
    rows = pad_rows(texts[:1], length=5, pad=0)
    model = make_model(SHAPE)
    hidden = model.apply(params, rows.tokens, rows.segments)
    logits = np.asarray(model.unembed(params, hidden)[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(4), rows.tokens[0, 1:]]
    got, _ = loss_and_gradient(params, rows, loss="dft")
    np.testing.assert_allclose(got, -(np.exp(chosen) * chosen).mean(), rtol=1e-5)


def test_neftune_is_uniform_within_its_bound():
    """±α/√(T·D): with α = 6, T = 4 tokens of a text and D = 16 it is ±¾."""
    config = TransformerConfig(**vars(SHAPE) | {"neftune_alpha": 6.0})
    segments = jnp.tile(jnp.array([[1, 1, 1, 1, 2, 0]]), (64, 1))
    noise = forward.embedding_noise(
        config, segments, jnp.zeros((64, 6, 16)), jax.random.key(0)
    )
    assert 0.74 < np.abs(noise[:, :4]).max() <= 0.75
    np.testing.assert_allclose(np.square(noise[:, :4]).mean(), 0.75**2 / 3, rtol=0.05)
    # a text of one token has noise twice as large
    assert 1.48 < np.abs(noise[:, 4]).max() <= 1.5


def test_neftune_acts_in_training_alone(params):
    noisy = make_model(TransformerConfig(**vars(SHAPE) | {"neftune_alpha": 5.0}))
    rows = pad_rows([Text(np.arange(4), np.ones(4, bool))], length=4, pad=0)
    plain, _ = loss_and_gradient(params, rows)
    one, _ = loss_and_gradient(params, rows, model=noisy, key=1)
    other, _ = loss_and_gradient(params, rows, model=noisy, key=2)
    assert abs(one - plain) > 1e-3 and abs(one - other) > 1e-3
    config = get_config()
    total, count = sft.loss_sums(noisy, config, params, rows)  # as held-out rows are
    np.testing.assert_allclose(total / count, plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning.loss": "nlll"}, "loss='nlll' is unknown; take one of nll, dft"),
        ({"learning.buckets": (8,)}, "two ways to save padding"),
        ({"learning.accumulation": 0}, "accumulation=0 must be at least 1"),
        ({"neftune_alpha": -1.0}, "neftune_alpha=-1.0 must be at least 0"),
        ({"sequence_tokens": 1}, "sequence_tokens=1 must be at least 2"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    config = get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        sft.validate(config, make_mesh())


# TRL's steps, from tests/reference/compare_sft_with_trl.py


@functools.cache
def saved():
    with np.load(FIXTURES / "sft_step.npz") as file:
        return dict(file)


def trl_texts():
    return [Completion(*row.values()) for row in json.loads(str(saved()["texts"]))]


def trl_rows():
    """TRL's batch as ours: it learns the labels that are not -100."""
    tokens, labels = saved()["input_ids"], saved()["labels"]
    lengths = np.array([len((x.prompt + x.response).split()) for x in trl_texts()])
    # TRL's order is that of its seed: a row's EOS says how long it is.
    eos = json.loads(str(saved()["words"])).index("<eos>")
    ends = (tokens == eos).argmax(axis=1)
    assert sorted(ends) == sorted(lengths)
    real = np.arange(tokens.shape[1])[None] <= ends[:, None]
    return Rows(tokens, real.astype(np.int32), labels != -100)


def trl_config():
    config = get_config()
    config.update({"model": str(SOURCE), "dropout": 0.0, "total_phases": 1})
    config.update_from_flattened_dict(json.loads(str(saved()["settings"])))
    return config


def test_the_encoding_of_trl():
    words = {word: i for i, word in enumerate(json.loads(str(saved()["words"])))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    theirs = trl_rows()
    length = theirs.tokens.shape[1]
    encoded = encode_completions(
        tokenizer, trl_texts(), length=length, completion_only=True
    )
    ours = pad_rows(encoded, length=length, pad=words["<pad>"])
    rows = lambda x: sorted(zip(*(y.tolist() for y in x), strict=True))
    assert rows(ours) == rows(theirs)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_steps_of_trl(accumulation, tmp_path):
    """The same losses and gradient norms, and the same weights after the last step."""
    config, mesh, metrics = trl_config(), single_mesh(), []
    with jax.set_mesh(mesh):
        found = loading.load_model(config.model, config, mesh)
        state, optimizer = offline.make_state(config, found.params, mesh)
        update = offline.make_update(
            sft.make_loss(found.model, config),
            optimizer,
            accumulation=accumulation,
            counts=sft.count_learned,
        )
        rows = Rows(*(x[None] for x in trl_rows()))
        for step in range(len(saved()["losses"])):
            state, told = update(state, rows, jax.random.key(step))
            metrics.append(jax.device_get(told))
    for ours, theirs in (("loss", "losses"), ("grad_norm", "grad_norms")):
        got = [step[ours] for step in metrics]
        np.testing.assert_allclose(got, saved()[theirs], rtol=1e-4)

    weights = {
        name.removeprefix("weights/"): x
        for name, x in saved().items()
        if name.startswith("weights/")
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((SOURCE / "config.json").read_text("utf-8"))
    expected, before = (
        jax.device_get(load_pretrained(folder, mesh=mesh).params)
        for folder in (tmp_path, SOURCE)
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, expected)
    assert min(jax.tree.leaves(moved)) > 5e-4
    assert_same_tree(jax.device_get(state.policy), expected, atol=1e-4)


# whole runs


def run_settings(world, workdir, **changes):
    """configs/sft.py in the tiny world, `__` in the place of dots."""
    config = get_config()
    settings = {
        "workdir": str(workdir),
        "model": str(world.policy),
        "data.source": str(world.texts),
        "data.domains": (),
        "sequence_tokens": 40,
        "learning.batch": 8,
        "optimizer.warmup_steps": 0,
        "prompts.train": str(world.prompts),
        "prompts.heldout": str(world.prompts),
        "prompts.prefix_words": 2,
        "rollout.max_new_tokens": 6,
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(settings | changes)
    return config


def test_the_template_of_the_config_is_around_plain_prompts(world, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Why {i}?", "response": f"So {i}."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    changes = {"data__source": str(path), "data__prompt_template": "Q: {prompt} A:"}
    config = run_settings(world, tmp_path, **changes)
    tokenizer = loading.load_run_tokenizer(config, make_console())
    for part in sft.load_data(config, tokenizer, make_console()):
        assert part
        for row in part:
            number = row.response.removeprefix("So ")[:-1]
            assert row.prompt == f"Q: Why {number}? A:"


@pytest.mark.parametrize("packing", [True, False])
def test_eight_devices_and_one_agree(world, run, tmp_path, packing):
    """After five steps at a learning rate at which rounding does not grow."""
    calm = {
        "total_phases": 1,
        "learning__steps_per_phase": 5,
        "learning__accumulation": 2,
        "learning__packing": packing,
    }
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    run(run_settings(world, tmp_path / "one", **calm))
    run(run_settings(world, tmp_path / "eight", **calm, **split), devices=8)
    assert_same_training(tmp_path / "eight", tmp_path / "one")
    first, last = metrics_of(tmp_path / "eight")
    assert last["heldout/loss"] < first["heldout/loss"] - 0.01

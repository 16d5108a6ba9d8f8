"""Classifiers' checkpoints as rewards, by themselves and from a config."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.encoder import make_encoder
from rlhf_jax.models.encoder_weights import load_encoder
from rlhf_jax.rewards import build_rewards, classifier, score_all
from rlhf_jax.rewards.classifier import batches, load_classifier, padded_length
from rlhf_jax.rewards.labels import Reading
from rlhf_jax.rewards.model import load_reward_model
from tests.rewards.conftest import TEXTS

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NAMES = ["bert", "distilbert", "roberta", "xlm-roberta"]
LABELS = {"bert": "joy", "distilbert": None, "roberta": None, "xlm-roberta": None}
INDEX = {"bert": 1, "distilbert": 1, "roberta": 0, "xlm-roberta": 1}
PROMPTS = ["The film is", "The camera", "", "The film is", "good"]
RESPONSES = [" good", " dies", "", " really good at all", ""]


@pytest.fixture(scope="session")
def tokenizer():
    """Of 96 tokens, with one special token on either side of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=96, special_tokens=list(special.values()), show_progress=False
        ),
    )
    ends = [(name, fast.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, **special)


@pytest.fixture
def directory(tmp_path, tokenizer):
    """The directory of an encoder with a tokenizer, its config.json changed."""

    def make(name, **settings):
        folder = tmp_path / name
        shutil.copytree(FIXTURES / "encoders" / name, folder)
        hf_config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(hf_config))
        tokenizer.save_pretrained(folder)
        return folder

    return make


def one_by_one(folder, texts):
    """Logits [B, n] of each text alone; long ones lose their start."""
    found, tokenizer = load_encoder(folder), load_tokenizer(folder)
    apply = jax.jit(make_encoder(found.config).apply)
    longest = found.config.trunk.max_positions
    rows = []
    for text in texts:
        first, *middle, last = tokenizer(text)["input_ids"]
        ids = [first, *middle[-(longest - 2) :], last]
        mask = np.arange(longest) < len(ids)  # one length: compiled once
        ids = np.array(ids + [0] * (longest - len(ids)))
        rows.append(np.asarray(apply(found.params, ids[None], mask[None]))[0])
    return np.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_any_length_and_order_are_scored_alike(
    directory, mesh, monkeypatch, name
):
    monkeypatch.setattr(classifier, "ROWS", 3)  # 8 rows on 8 devices
    folder = directory(name)
    score = load_classifier(folder, mesh=mesh, reading=Reading(label=LABELS[name]))
    prompts, responses = PROMPTS * 2, RESPONSES * 2
    prompts[7] = "really good, " * 30  # far beyond 40 positions
    texts = [prompt + response for prompt, response in zip(prompts, responses)]
    want = one_by_one(folder, texts)[:, INDEX[name]]
    got = score(prompts, responses, label=list(range(10)))
    assert got.shape == (10,) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.ptp(got) > 0.1  # the texts are told apart
    order = np.random.default_rng(0).permutation(10)
    again = score([prompts[i] for i in order], [responses[i] for i in order])
    np.testing.assert_allclose(again, got[order], atol=1e-5)
    assert score([], []).shape == (0,)


def test_any_mesh_gives_the_same(directory, mesh):
    folder = directory("distilbert")
    other = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    want = load_classifier(folder, mesh=mesh)(PROMPTS, RESPONSES)
    got = load_classifier(folder, mesh=other)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(got, want, atol=1e-5)
    low = load_classifier(folder, mesh=mesh, dtype="bfloat16")(PROMPTS, RESPONSES)
    assert 1e-5 < np.abs(low - want).max() < 0.1 * np.ptp(want)


def test_long_texts_lose_their_beginning(directory, mesh):
    score = load_classifier(directory("distilbert"), mesh=mesh)
    end = "The film is good, " * 12
    first, second = score(["really " * 40, "nothing " * 40], [end, end])
    assert first == second
    assert np.ptp(score([end, end], [" good", " dies"])) > 1e-3


def test_few_shapes_hold_all_texts():
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.geometric(1 / 120, size=500), 512)
    ids = [[index % 90 + 5] * n for index, n in enumerate(lengths)]
    shapes, seen = set(), []
    for batch, tokens, mask in batches(ids, 32, 512):
        shapes.add(tokens.shape)
        seen.extend(batch)
        assert tokens.shape == mask.shape
        for row, index in enumerate(batch):
            assert tokens[row][mask[row]].tolist() == ids[index]
            assert mask[row, : lengths[index]].all()
        assert not mask[len(batch) :].any()
    assert sorted(seen) == list(range(500))
    assert {rows for rows, _ in shapes} == {32}
    allowed = {32, 48, 64, 96, 128, 192, 256, 384, 512}
    assert {T for _, T in shapes} <= allowed
    assert {padded_length(n, 512) for n in range(1, 513)} == allowed
    assert padded_length(33, 40) == 40
    assert all(n <= padded_length(n, 512) for n in range(1, 513))
    assert all(padded_length(n, 512) <= 1.5 * n for n in range(32, 513))


# From a config.


def build(mesh, source, **options):
    (reward,) = build_rewards({"mine": {"source": str(source), **options}}, mesh=mesh)
    return score_all([reward], PROMPTS, RESPONSES)[0]


def test_label_output_and_text_of_a_config(directory, mesh):
    folder = directory("distilbert")
    whole = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    want, wanted_alone = np.split(one_by_one(folder, [*whole, *RESPONSES]), 2)
    np.testing.assert_allclose(build(mesh, folder), want[:, 1], atol=1e-5)
    bad = build(mesh, folder, label="negative", output="probability")
    weights = np.exp(want)
    np.testing.assert_allclose(bad, weights[:, 0] / weights.sum(1), atol=1e-5)
    alone = build(mesh, folder, text="{response}")
    np.testing.assert_allclose(alone, wanted_alone[:, 1], atol=1e-5)


def test_labels_that_do_not_exclude_each_other(directory, mesh):
    folder = directory("bert")
    whole = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    z = one_by_one(folder, whole)[:, 2]
    got = build(mesh, folder, label="fear", output="probability")
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-z)), atol=1e-5)


def decoder(folder, model_directory, change, **settings):
    """A copy of the conftest's reward model with another head."""
    shutil.copytree(model_directory, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors | change, folder / "model.safetensors")
    hf_config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder


def test_a_decoder_with_several_labels(model_directory, mesh, tmp_path):
    with np.load(FIXTURES / "heads.npz") as arrays:
        weight = arrays["weight"]
    labels = {"0": "no", "1": "perhaps", "2": "yes"}
    folder = decoder(
        tmp_path / "m", model_directory, {"score.weight": weight}, id2label=labels
    )
    logits = np.stack([build(mesh, folder, label=i) for i in range(3)], axis=1)
    one = decoder(
        tmp_path / "one",
        model_directory,
        {"score.weight": weight[1:2]},
        id2label={"0": "LABEL_0"},
    )
    alone = load_reward_model(one, mesh=mesh)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(logits[:, 1], alone, atol=1e-5)
    weights = np.exp(logits.astype(np.float64))
    got = build(mesh, folder, label="yes", output="probability")
    np.testing.assert_allclose(got, weights[:, 2] / weights.sum(1), rtol=1e-4)
    with pytest.raises(UserError, match="0: no, 1: perhaps, 2: yes"):
        build(mesh, folder)


def test_a_score_model_of_safe_rlhf_with_its_text(model_directory, mesh, tmp_path):
    with np.load(FIXTURES / "heads.npz") as arrays:
        weight, bias = arrays["weight"][:1], arrays["bias"][:1]
    plain = decoder(tmp_path / "plain", model_directory, {"score.weight": weight})
    beaver = decoder(
        tmp_path / "beaver",
        model_directory,
        {"score_head.weight": weight, "score_head.bias": bias},
        architectures=["LlamaForScore"],
        score_dim=1,
        score_type="cost",
    )
    got = build(mesh, beaver, text="film: {prompt} good:{response}")
    texts = [f"film: {p} good:{r}" for p, r in zip(PROMPTS, RESPONSES)]
    want = load_reward_model(plain, mesh=mesh)([""] * 5, texts) + bias
    np.testing.assert_allclose(got, want, atol=1e-5)


# Errors.


def pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (pickles, {}, "never opened; save it again as safetensors: .*save_pretrained"),
        (no_weights, {}, r"holds no weights .*save it again as safetensors"),
        (no_tokenizer, {}, "no tokenizer could be read from .*distilbert"),
        (lambda folder: None, {"label": "joy"}, "labels are 0: NEGATIVE, 1: POSITIVE"),
        (lambda folder: None, {"output": "odds"}, "unknown output 'odds'"),
        (lambda folder: None, {"text": "whole"}, "no response"),
        (lambda folder: None, {"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_directories_and_options_that_are_refused(
    directory, mesh, spoil, options, words
):
    folder = directory("distilbert")
    spoil(folder)
    with pytest.raises(UserError, match=words):
        build(mesh, folder, **options)


def test_architectures_that_are_refused(directory, mesh):
    folder = directory("distilbert", model_type="deberta-v2")
    with pytest.raises(UserError, match=r"'deberta-v2'.* bert, .* gpt2, .*gemma3_text"):
        build(mesh, folder)


def test_more_tokens_than_the_classifier_has(directory, mesh, tokenizer):
    folder = directory("distilbert")
    larger = load_tokenizer(folder)
    larger.add_tokens([f"word{i}" for i in range(20)])
    larger.save_pretrained(folder)
    with pytest.raises(UserError, match="the classifier only 99: they are no pair"):
        build(mesh, folder)


def test_a_regression_has_no_probability(directory, mesh):
    folder = directory("roberta", problem_type="regression")
    assert build(mesh, folder).shape == (5,)
    with pytest.raises(UserError, match="this model is a regression"):
        build(mesh, folder, output="probability")


def test_a_function_has_no_label(mesh):
    with pytest.raises(UserError, match=r"\(vader\) is no model, and only .* label"):
        build(mesh, "vader", label="good")

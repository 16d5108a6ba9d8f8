"""Reward models: TRL's steps, micro-batches, meshes, data, what runs leave."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import reward_model as reward_config
from rlhf_jax import loading, sharding
from rlhf_jax.data import reviews
from rlhf_jax.data.labelled_pairs import Pairs, encode_pairs
from rlhf_jax.data.rows import Pair
from rlhf_jax.errors import UserError
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.progress import make_console
from rlhf_jax.rewards import build_rewards, score_all
from rlhf_jax.trainers import offline, reward_model
from tests.trainers.one_phase import single_mesh

from .conftest import NOUNS
from .runs import assert_same_training, metrics_of
from .test_runs import check_learns_and_resumes, made_up_reviews

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama_score"

pytestmark = pytest.mark.usefixtures("run")  # which makes XLA quick


@functools.cache
def saved():
    with np.load(FIXTURES / "reward_model_step.npz") as file:
        return dict(file)


CASES = json.loads(str(saved()["cases"]))


def changed(config, changes):
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def trl_config(case, **changes):
    """configs/reward_model.py with the fixture's settings of a case."""
    config = reward_config.get_config()
    config.model = str(SOURCE)
    config.dropout = 0.0
    config.learning.batch = 4
    config.total_phases = 1
    settings = json.loads(str(saved()["settings"])) | CASES[case]
    config.update_from_flattened_dict(settings)
    return changed(config, changes)


def trl_batch(case):
    """TRL's batch as ours: its chosen rows come first, then the rejected ones."""
    tokens, mask = (
        np.stack(np.split(saved()[name], 2), axis=1)
        for name in ("input_ids", "attention_mask")
    )
    margin = saved()["margin"] if CASES[case]["learning.margin"] else np.zeros(4)
    return Pairs(
        tokens,
        mask.astype(bool),
        np.ones(4, np.float32),
        margin.astype(np.float32),
        np.zeros((4, 2), bool),
    )


def take_steps(config, mesh, batch, steps):
    """The metrics of each step on a batch, and the weights in the end."""
    with jax.set_mesh(mesh):
        found = loading.load_model(config.model, config, mesh, head=True)
        state, optimizer = offline.make_state(config, found.params, mesh)
        pieces = config.learning.accumulation
        micro = {"accumulation": pieces, "counts": reward_model.count}
        update = offline.make_update(
            reward_model.make_loss(found.model, config),
            optimizer,
            **micro if pieces > 1 else {},
        )
        batches = sharding.to_devices(
            jax.tree.map(lambda x: x[None], batch), sharding.replicated(mesh)
        )
        metrics = []
        for step in range(steps):
            state, told = update(state, batches, jax.random.key(step))
            metrics.append({k: float(v) for k, v in told.items()})
    return metrics, jax.device_get(state.policy)


def assert_close(params, expected, atol):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=atol),
        params,
        expected,
    )


# the step, against TRL


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_steps_of_trl(case, accumulation, tmp_path):
    """The same losses and gradient norms, and the same weights after the last step."""
    config = trl_config(case, learning__accumulation=accumulation)
    steps = len(saved()[f"{case}/losses"])
    mesh = single_mesh()
    metrics, params = take_steps(config, mesh, trl_batch(case), steps)
    for ours, theirs in (("loss", "losses"), ("grad_norm", "grad_norms")):
        got = [step[ours] for step in metrics]
        np.testing.assert_allclose(got, saved()[f"{case}/{theirs}"], rtol=1e-4)

    prefix = f"{case}/weights/"
    weights = {
        name.removeprefix(prefix): x
        for name, x in saved().items()
        if name.startswith(prefix)
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((SOURCE / "config.json").read_text("utf-8"))
    expected, before = (
        jax.device_get(load_pretrained(folder, mesh=mesh, head=True).params)
        for folder in (tmp_path, SOURCE)
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, expected)
    assert min(jax.tree.leaves(moved)) > 5e-4
    assert_close(params, expected, 1e-4)


def test_the_encoding_of_trl():
    """Its own tokens of the same texts, EOS at the end of both sides."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(json.loads(str(saved()["words"])))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    pairs = [Pair(**row) for row in json.loads(str(saved()["texts"]))]
    theirs = trl_batch("all")
    ours = encode_pairs(
        tokenizer, pairs, length=theirs.tokens.shape[2], margin="column"
    )
    rows = lambda x: sorted(zip(*(y.tolist() for y in (x.tokens, x.mask, x.margin))))
    assert rows(ours) == rows(theirs)


# the loss and its parts


def test_micro_batches_are_the_whole_batch():
    # With Adam's own eps a gradient of zero is as large a step as any other.
    plain = {"optimizer__eps": 1.0, "optimizer__lr": 1.0, "optimizer__clip_norm": 0.0}
    parts = []
    for accumulation in (1, 4):
        config = trl_config("all", **plain, learning__accumulation=accumulation)
        parts.append(take_steps(config, single_mesh(), trl_batch("all"), 1))
    (whole, expected), (cut, params) = parts
    assert cut[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-5)
    assert_close(params, expected, 1e-4)


def measured(config, batch):
    """Metrics of the first step, before the weights move, and the scores [B, 2]."""
    mesh = single_mesh()
    with jax.set_mesh(mesh):
        found = loading.load_model(config.model, config, mesh, head=True)
        scores = reward_model.make_scores(found.model, config, mesh)(
            found.params, batch
        )
    (metrics,), _ = take_steps(config, mesh, batch, 1)
    return reward_model.with_deviation(metrics), scores


def test_metrics_are_those_of_the_scores():
    metrics, scores = measured(trl_config("plain"), trl_batch("plain"))
    margins = scores[:, 0] - scores[:, 1]
    loss = np.mean(np.logaddexp(0.0, -margins))  # −log σ(m) = log(1 + e^−m)
    wanted = {
        "loss": loss,
        "accuracy": np.mean(margins > 0),
        "margin": margins.mean(),
        "score_mean": scores.mean(),
        "score_std": scores.std(),
    }
    assert {k: metrics[k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
    assert "score_square" not in metrics


def test_soft_labels_and_margins_reach_the_loss():
    batch = trl_batch("all")._replace(probability=np.float32([0.9, 0.6, 0.7, 1.0]))
    metrics, scores = measured(trl_config("all"), batch)
    x = scores[:, 0] - scores[:, 1] - batch.margin
    p = batch.probability
    nll = p * np.logaddexp(0, -x) + (1 - p) * np.logaddexp(0, x)
    wanted = np.mean(nll + 0.05 * scores.sum(axis=1) ** 2)
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-5)


def test_padding_content_is_irrelevant():
    batch = trl_batch("plain")
    other = batch._replace(tokens=np.where(batch.mask, batch.tokens, 90))
    first, second = (measured(trl_config("plain"), each) for each in (batch, other))
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])


# data


def reward_settings(world, workdir, **changes):
    config = reward_config.get_config()
    settings = {
        "workdir": str(workdir),
        "total_phases": 4,
        "model": str(world.policy),
        "data.rounds": 2,
        "sequence_tokens": 24,
        "learning.batch": 8,
        "learning.steps_per_phase": 8,
        "optimizer.lr": 3e-3,
        "optimizer.warmup_steps": 4,
        "checkpoint.every": 2,
        "evaluate_every": 2,
    }
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return changed(config, settings | changes)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def load_data(config):
    tokenizer = loading.load_run_tokenizer(config, make_console())
    return reward_model.load_data(config, tokenizer, make_console())


def test_no_text_is_on_both_sides(world, tmp_path, capsys):
    """One answer is in many rows: where it is held out, training drops the others."""
    rows = [
        {
            "prompt": "",
            "chosen": f"The {noun} likes {i}.",
            "rejected": "Nothing." if i < 10 else f"No {noun} {i}.",
        }
        for i in range(40)
        for noun in NOUNS[:3]
    ]
    rows += [rows[0], {"prompt": "x", "chosen": "same", "rejected": "same"}]
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    train, heldout = load_data(
        reward_settings(world, tmp_path / "run", data__source=source)
    )
    assert train and heldout
    texts = lambda pairs: {p.prompt + side for p in pairs for side in p[1:3]}
    assert not texts(train) & texts(heldout)
    told = capsys.readouterr().out
    assert "in the held-out split" in told and "1 duplicate" in told and "1 tie" in told


def test_a_margin_by_the_data_or_the_raters(world, tmp_path):
    config = reward_settings(world, tmp_path)
    tokenizer = loading.load_run_tokenizer(config, make_console())
    pair = Pair("The cat", " sees.", " finds.", 0.75, margin=2.5)
    encode = functools.partial(encode_pairs, tokenizer, [pair], length=12)
    assert encode().margin.tolist() == [0] and encode().probability.tolist() == [1]
    assert encode(margin="column").margin.tolist() == [2.5]
    assert encode(margin="raters").margin.tolist() == [0.5]  # 0.75 − 0.25
    assert encode(soft_labels=True).probability.tolist() == [0.75]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning__margin": "gap"}, "margin='gap' is unknown; take one of '', 'col"),
        ({"learning__margin": "raters"}, "are two uses of the same probability"),
        ({"learning__centering": -1.0}, r"centering=-1\.0 must be at least 0"),
        ({"learning__accumulation": 3}, "batch=8 must be a multiple of"),
        ({"data__source": ""}, r"config\.data\.source is empty: give a file"),
        (
            {"learning__margin": "column", "learning__soft_labels": False},
            "pairs of builtin:reviews have no margin: give data",
        ),
    ],
)
def test_settings_that_cannot_work(world, run, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(reviews, "load_reviews", made_up_reviews)
    with pytest.raises(UserError, match=message):
        run(reward_settings(world, tmp_path / "run", **changes))


# whole runs


def test_a_reward_model_and_what_it_leaves(world, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reviews, "load_reviews", made_up_reviews)
    make_config = functools.partial(reward_settings, world)
    check_learns_and_resumes(run, make_config, tmp_path, monkeypatch, capsys)
    folder = tmp_path / "straight"
    last = metrics_of(folder)[-1]
    assert last["heldout/accuracy"] > 0.8
    assert {"margin", "grad_norm", "optimizer/lr", "score_mean", "score_std"} <= set(
        last
    )

    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    told = summary["accuracy"]
    assert told["model"]["value"] == pytest.approx(last["heldout/accuracy"])
    assert set(told) >= {"model", "bag of words"} and len(told) == 3
    names = {path.name for path in (folder / "report").iterdir()}
    assert names == {"report.md", "cases.json", "figures.png"}
    cases = json.loads((folder / "report" / "cases.json").read_text("utf-8"))
    assert len(cases) == min(30, told["model"]["count"]) >= 20

    # of mean 0 and deviation 1 over the responses it was trained on
    train, _ = load_data(make_config(folder))
    sides = [(p.prompt, side) for p in train for side in (p.chosen, p.rejected)]
    source = {"source": str(folder), "normalize": True}
    rewards = build_rewards({"human": source}, mesh=single_mesh())
    total, _ = score_all(rewards, *map(list, zip(*sides)))
    assert total.mean() == pytest.approx(0, abs=1e-3)
    assert total.std() == pytest.approx(1, abs=1e-3)


def test_an_adapter_alone_learns_and_is_merged(world, run, tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "load_reviews", made_up_reviews)
    run(reward_settings(world, tmp_path / "run", lora__rank=4, lora__dropout=0.1))
    first, *_, last = metrics_of(tmp_path / "run")
    assert last["heldout/loss"] < 0.9 * first["heldout/loss"]
    names = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert "score.weight" in names and not any("lora" in name for name in names)

    # and goes on, with the head that was trained beside it
    changes = {"lora__rank": 4, "lora__start": str(tmp_path / "run")}
    run(reward_settings(world, tmp_path / "on", total_phases=1, **changes))
    first, *_ = metrics_of(tmp_path / "on")
    assert first["heldout/loss"] == pytest.approx(last["heldout/loss"], abs=1e-5)


def test_eight_devices_and_one_agree(world, run, tmp_path, monkeypatch):
    """After five steps at a learning rate at which rounding does not grow."""
    monkeypatch.setattr(reviews, "load_reviews", made_up_reviews)
    calm = {
        "optimizer__lr": 3e-4,
        "total_phases": 1,
        "learning__steps_per_phase": 5,
        "learning__accumulation": 2,
    }
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    run(reward_settings(world, tmp_path / "one", **calm))
    run(reward_settings(world, tmp_path / "eight", **calm, **split), devices=8)
    assert_same_training(tmp_path / "eight", tmp_path / "one")

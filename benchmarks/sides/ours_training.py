"""Our side of the benchmark: the steps of the trainers, as a run takes them."""

import functools
import pathlib
import runpy

import jax
import numpy as np
from cases import (
    GROUP,
    LONG_PROMPT,
    NEW,
    PROMPT,
    ROWS,
    SHORT_NEW,
    TRAIN_ROWS,
    TRAIN_TOKENS,
    even_share,
    pair_texts,
    prompt_texts,
    ragged_texts,
    tokens,
)
from worker import Case

from rlhf_jax import loading, sharding
from rlhf_jax.data.packing import Rows, Text, pack_rows
from rlhf_jax.data.pairs import encode_pairs
from rlhf_jax.data.prompts import Prompts
from rlhf_jax.data.rows import Pair
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.rewards import Reward
from rlhf_jax.rollout.sampler import sampler_of
from rlhf_jax.trainers import dpo, grpo, offline, ppo, sft
from rlhf_jax.trainers.optimizer import make_optimizer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PLAIN_ADAM = {
    "optimizer.lr": 1e-4,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "remat": False,
    "unroll": 6,
    "total_phases": 1000,
    "judges": {},
}
ROLLOUT = {
    "rollout.prompt_tokens": PROMPT,
    "rollout.max_new_tokens": NEW,
    "rollout.temperature": 1.0,
}
LONG_ROLLOUT = ROLLOUT | {
    "rollout.prompt_tokens": LONG_PROMPT,
    "rollout.max_new_tokens": SHORT_NEW,
}


def setup(algorithm: str, folder: str, name: str, **changes):
    """The config of configs/<algorithm>.py with changes, the mesh, and the model."""
    config = runpy.run_path(str(CONFIGS / f"{algorithm}.py"))["get_config"]()
    config.model = str(pathlib.Path(folder) / name)
    plain = {key: value for key, value in PLAIN_ADAM.items() if _has(config, key)}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(plain | changes)
    mesh = sharding.make_mesh(**config.mesh)
    jax.set_mesh(mesh)
    return config, mesh, loading.load_model(config.model, config, mesh)


def _has(config, key: str) -> bool:
    *path, last = key.split(".")
    return last in functools.reduce(lambda node, name: node[name], path, config)


def train(folder: str, *, dtype: str = "float32") -> Case:
    """Steps of AdamW on full rows."""
    config, mesh, loaded = setup(
        *("sft", folder, "fixed"),
        dtype=dtype,
        dropout=0.0,
        learning__steps_per_phase=1,
        optimizer__weight_decay=0.01,
    )
    given = tokens("train", TRAIN_ROWS, TRAIN_TOKENS).astype(np.int32)
    ones = np.ones(given.shape, np.int32)
    batches = jax.tree.map(lambda x: x[None], Rows(given, ones, ones.astype(bool)))
    start = jax.tree.map(np.array, loaded.params)
    state, optimizer = offline.make_state(config, loaded.params, mesh)
    update = offline.make_update(
        sft.make_loss(loaded.model, config),
        optimizer,
        accumulation=1,
        counts=sft.count_learned,
    )

    def run(number: int):
        nonlocal state
        state, metrics = update(state, batches, jax.random.key(number))
        metrics = jax.block_until_ready(metrics)
        run.loss = float(metrics["loss"])

    def outputs():
        losses = [run.loss]
        for number in range(2):
            run(number)
            losses.append(run.loss)
        moved = jax.tree.map(np.subtract, state.policy, start)
        first = jax.tree.map(lambda x: x[0], moved["layers"])
        return {
            "losses": losses,
            "moved query": first["attention"]["query"]["kernel"].T,
            "moved down": first["mlp"]["down"]["kernel"].T,
            "moved unembedding": moved["unembed"]["kernel"],
        }

    return Case(run, outputs)


def phases(run_phase, state, *told: str, counted: bool = False) -> Case:
    """A case of a trainer's own `run_phase`, with metrics of it as outputs.

    Args:
      run_phase: (state, phase) -> (state, metrics, rows).
      state: to start from.
      *told: the metrics to compare, of the second phase.
      counted: take `units` from the metrics.
    """

    def run(number: int):
        nonlocal state
        state, metrics, _ = run_phase(state, number + 1)
        jax.block_until_ready(state)
        run.metrics = metrics
        return float(metrics["units"]) if counted else None

    def outputs():
        run(1)
        return {name.split("/")[-1]: float(run.metrics[name]) for name in told}

    return Case(run, outputs)


def even_reward() -> list[Reward]:
    """The share of even tokens of a response, as a run's only reward."""

    def score(prompts, responses):
        return np.array([even_share(text) for text in responses], np.float32)

    return [Reward("even", "", 1.0, score)]


def grpo_step(
    folder: str, *, name: str = "fixed", lean: bool = False, long: bool = False
) -> Case:
    """Whole phases: sampling, rewards, log-probabilities, one optimizer step.

    The rate is next to nothing, or lengths would change from step to step. As in TRL no
    pass is spent on old log-probabilities; here they are the sampler's. `lean`: layers
    are scanned and recomputed; `long`: prompts are long, and responses short.
    """
    config, mesh, loaded = setup(
        *("grpo", folder, name),
        **(LONG_ROLLOUT if long else ROLLOUT),
        rollout__prompts=ROWS // GROUP,
        rollout__group=GROUP,
        optimizer__lr=1e-9,
        grpo__epochs=1,
        grpo__minibatches=1,
        grpo__kl_coef=0.04,
        rollout__reuse_logprobs=True,
        logprob_chunk=16,
        grpo__packing=True,
        **({"remat": True, "unroll": 1} if lean else {}),
    )
    optimizer = make_optimizer(config.optimizer, config.optimizer.lr, 1000)
    tokenizer = load_tokenizer(config.model)
    reference = loading.copy(loaded.params)
    state = grpo.State(
        loaded.params, loading.init_optimizer(optimizer, loaded.params, mesh)
    )
    run_phase = grpo.make_phase(
        *(config, mesh, loaded.model, optimizer),
        sampler_of(config.rollout, loaded.model, tokenizer, mesh),
        *(even_reward(), Prompts(prompt_texts(config.rollout.prompt_tokens), {})),
        *(reference, None),
    )
    return phases(run_phase, state, "policy/entropy")


def ppo_step(folder: str) -> Case:
    """Whole phases of PPO: two epochs of two minibatches, a critic of its own.

    Old log-probabilities are the sampler's.
    """
    config, mesh, loaded = setup(
        *("ppo", folder, "fixed"),
        **ROLLOUT,
        rollout__prompts=ROWS,
        ppo__epochs=2,
        ppo__minibatches=2,
        rollout__reuse_logprobs=True,
    )
    reference = loading.copy(loaded.params)
    models, state, optimizer = ppo.make_state(config, loaded, loaded.params, mesh)
    sample = sampler_of(
        config.rollout, loaded.model, load_tokenizer(config.model), mesh
    )
    run_phase = ppo.make_phase(
        *(config, mesh, models, optimizer, sample, even_reward()),
        *(Prompts(prompt_texts(), {}), reference, None),
    )
    return phases(run_phase, state, "policy/entropy")


def dpo_step(folder: str, *, ragged: bool = False) -> Case:
    """Steps on 8 pairs whose reference log-probabilities are known."""
    config, mesh, loaded = setup(
        *("dpo", folder, "fixed"),
        sequence_tokens=TRAIN_TOKENS,
        logprob_chunk=16,
        learning__batch=8,
        learning__steps_per_phase=1,
        learning__packing=True,
    )
    tokenizer = load_tokenizer(config.model)
    texts = [Pair(*texts) for texts in pair_texts(ragged=ragged)]
    encoded = encode_pairs(tokenizer, texts, length=TRAIN_TOKENS)
    pairs = dpo.Pairs(*encoded[:3], np.zeros((len(texts), 2), np.float32))
    scored = jax.jit(functools.partial(dpo.response_logprobs, loaded.model, config))(
        loaded.params, pairs
    )
    pairs = pairs._replace(ref_logprobs=np.array(scored.logprobs.T))
    state, optimizer = offline.make_state(config, loaded.params, mesh)
    run_phase = offline.make_phase(
        *(config, mesh, dpo.make_loss(loaded.model, config), optimizer, pairs),
        pack=functools.partial(dpo.lay_out, accumulation=1),
        accumulation=1,
        counts=dpo.count,
    )
    return phases(run_phase, state, "loss")


def sft_step(folder: str) -> Case:
    """Steps on 8 packed rows of texts of all lengths; units are learned tokens."""
    config, mesh, loaded = setup(
        *("sft", folder, "fixed"),
        dropout=0.0,
        sequence_tokens=TRAIN_TOKENS,
        learning__batch=TRAIN_ROWS,
        learning__steps_per_phase=1,
    )
    texts = []
    for ids in ragged_texts():
        ids = np.append(ids, 8191).astype(np.int32)
        texts.append(Text(ids, np.arange(len(ids)) > 0))
    rows = pack_rows(texts, length=TRAIN_TOKENS, pad=8190)
    learned = rows.learned.sum() / len(rows.learned) * TRAIN_ROWS
    state, optimizer = offline.make_state(config, loaded.params, mesh)
    step = sft.make_phase(config, mesh, loaded.model, optimizer, rows, None)

    def run_phase(state, phase):
        state, metrics, found = step(state, phase)
        return state, metrics | {"units": learned}, found

    return phases(run_phase, state, counted=True)


BUILDERS = {
    "train": train,
    "train_bf16": functools.partial(train, dtype="bfloat16"),
    "grpo": grpo_step,
    "grpo_long": functools.partial(grpo_step, long=True),
    "grpo_lean": functools.partial(grpo_step, lean=True),
    "grpo_ragged": functools.partial(grpo_step, name="ragged"),
    "dpo": dpo_step,
    "dpo_precomputed": dpo_step,
    "dpo_ragged": functools.partial(dpo_step, ragged=True),
    "sft": sft_step,
    "sft_packed": sft_step,
    "ppo": ppo_step,
}

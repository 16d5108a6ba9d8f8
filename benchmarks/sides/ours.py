"""Our side of the benchmark: generation, log-probabilities, and the models of both.

python ours.py <case> <folder>, started by ../peers.py
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
    GPT2,
    LLAMA,
    LONGEST,
    MODELS,
    NEW,
    PROMPT,
    REQUESTS,
    ROWS,
    TRAIN_TOKENS,
    tokens,
    write_tokenizer,
)
from worker import Case, serve

from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.pretrained import Pretrained, load_pretrained, save_pretrained
from rlhf_jax.models.transformer import make_model
from rlhf_jax.rollout import Sampling, generate, sample_keys
from rlhf_jax.rollout.logprobs import Transcript, score_responses


def fresh(hf_config: dict, mean_length: float | None) -> dict:
    """Random weights whose samples are neither uniform nor all the same.

    Channel 0 of every token is one large constant that only EOS looks at, so that a
    response ends with the same chance at each token: 1 / mean_length, or never.
    """
    model = make_model(config_from_hf(hf_config))
    params = jax.jit(model.init)(jax.random.key(0))
    if hf_config["model_type"] == "gpt2":
        return params
    embed = 5.0 * params["embed"]["tokens"]
    unembed = 7.5 * params["unembed"]["kernel"]
    params["embed"]["tokens"] = embed.at[:, 0].set(1.0)
    unembed = unembed.at[:, 0].set(0.0)
    unembed = unembed.at[hf_config["eos_token_id"]].set(0.0)
    seen = tokens("seen", 16, 64)
    hidden = jax.jit(model.apply)(params, seen, jnp.ones(seen.shape, bool))
    logits = jnp.einsum("btd,vd->btv", hidden, unembed)
    total = jax.nn.logsumexp(logits, axis=-1).mean()
    wanted = -50.0 if mean_length is None else total - jnp.log(mean_length - 1.0)
    scale = wanted / hidden[..., 0].mean()
    kernel = unembed.at[hf_config["eos_token_id"], 0].set(scale)
    return {**params, "unembed": {"kernel": kernel}}


def export(folder: str) -> None:
    """Write every model as Hugging Face keeps it, and a tokenizer."""
    for name, mean_length in MODELS.items():
        hf_config = GPT2 if name == "gpt2" else LLAMA
        target = pathlib.Path(folder) / name
        params = fresh(hf_config, mean_length)
        shape = config_from_hf(hf_config)
        save_pretrained(target, Pretrained(shape, hf_config, params))
        if name != "gpt2":
            write_tokenizer(str(target))


def load(folder: str, name: str, **settings):
    """The model's functions and its weights."""
    found = load_pretrained(pathlib.Path(folder) / name)
    return make_model(found.config, **settings), found.params


def sampling(temperature=1.0, top_p=1.0, new=NEW, model="fixed") -> Sampling:
    """How all responses are drawn; no special token of GPT-2's is an EOS."""
    eos, pad = (-1, 0) if model == "gpt2" else (8191, 8190)
    return Sampling(new, temperature, 0, top_p, eos, pad)


def drawn_by(
    folder: str, name: str, rows: int, settings: Sampling, prompts: str = "prompts"
):
    """`draw(number) -> Responses`, the jitted generator, model and weights."""
    model, params = load(folder, name)
    prompts = tokens(prompts, rows, PROMPT).astype(np.int32)
    jitted = jax.jit(functools.partial(generate, model), static_argnums=(4,))

    def draw(number: int, settings=settings):
        keys = sample_keys(jax.random.key(number), jnp.arange(rows))
        mask = np.ones(prompts.shape, bool)
        return jax.block_until_ready(jitted(params, prompts, mask, keys, settings))

    return draw, model, params, prompts


def generation(
    folder: str, *, top_p: float = 1.0, rows: int = ROWS, name: str = "fixed"
) -> Case:
    """Responses of equal length to equal prompts; greedy tokens are compared.

    Of samples the mean log-probability is compared, by the full softmax.
    """
    draw, model, params, prompts = drawn_by(
        folder, name, rows, sampling(top_p=top_p, model=name)
    )

    def outputs():
        greedy = draw(0, sampling(temperature=0.0, model=name))
        drawn = [draw(number) for number in range(4)]
        told = [
            score_responses(
                model,
                params,
                Transcript(prompts, np.ones(prompts.shape, bool), *one[:2]),
                temperature=1.0,
                chunk_size=None,
            ).logprobs
            for one in drawn
        ]
        return {"greedy": greedy.tokens, "sampled": np.mean(told)}

    def run(number: int):
        draw(number)

    return Case(run, outputs)


def requests(folder: str) -> Case:
    """Responses of all lengths to many prompts, in 16 slots that are refilled."""
    settings = sampling(new=LONGEST)._replace(slots=ROWS)
    draw, *_ = drawn_by(folder, "requests", REQUESTS, settings, prompts="requests")

    def outputs():
        drawn = [draw(number).mask.sum(axis=1).mean() for number in range(4)]
        return {"mean length": np.mean(drawn)}

    return Case(lambda number: float(draw(number).mask.sum()), outputs)


def logprobs(folder: str, *, name: str = "fixed", rows: int = ROWS) -> Case:
    """Log-probabilities of given tokens."""
    model, params = load(folder, name)
    given = tokens("logprobs", rows, TRAIN_TOKENS).astype(np.int32)
    mask = np.ones(given.shape, bool)

    @jax.jit
    def score(params, given, mask):
        parts = given[:, :1], mask[:, :1], given[:, 1:], mask[:, 1:]
        scored = score_responses(
            model, params, Transcript(*parts), temperature=1.0, chunk_size=8
        )
        return scored.logprobs

    def run(number: int):
        jax.block_until_ready(score(params, given, mask))

    return Case(run, lambda: {"logprobs": score(params, given, mask)})


BUILDERS = {
    "generate": generation,
    "generate_eager": generation,
    "top_p": functools.partial(generation, top_p=0.9),
    "top_p_eager": functools.partial(generation, top_p=0.9),
    "requests": requests,
    "requests_paged": requests,
    "logprobs": logprobs,
    "gpt2_generate": functools.partial(generation, name="gpt2"),
    "gpt2_top_p": functools.partial(generation, name="gpt2", top_p=0.9),
    "gpt2_logprobs": functools.partial(logprobs, name="gpt2"),
}


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export(sys.argv[2])
    elif sys.argv[1] in BUILDERS:
        serve(BUILDERS)
    else:
        import ours_training

        serve(ours_training.BUILDERS)

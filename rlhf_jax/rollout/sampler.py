"""Texts in, texts and arrays out: the sampler that trainers and evaluation share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.data.tokenizer import (
    check_vocabulary,
    decode_responses,
    encode_prompts,
    special_tokens,
)
from rlhf_jax.errors import UserError
from rlhf_jax.models.cache import CACHE_DTYPES
from rlhf_jax.models.transformer import Model
from rlhf_jax.rollout.generate import Responses, Sampling, generate, repeat_rows
from rlhf_jax.rollout.logprobs import Transcript
from rlhf_jax.rollout.sampling import sample_keys
from rlhf_jax.text_signals import distinct, repeated_share


class Texts(Sequence[str]):
    """Responses that are fetched and decoded when one is first asked for."""

    def __init__(self, decode: Callable[[], list[str]]):
        self._decode = functools.cache(decode)

    def __getitem__(self, index):
        return self._decode()[index]

    def __len__(self) -> int:
        return len(self._decode())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other)

    __hash__ = None


class Rollout(NamedTuple):
    """One batch of prompts and what the policy answered.

    Attributes:
      prompts: B prompt texts, those of a group repeated.
      responses: B response texts, without EOS; decoded when they are asked for.
      transcript: the same as arrays on the mesh.
      samples: what `generate` returned, on the mesh.
    """

    prompts: list[str]
    responses: Sequence[str]
    transcript: Transcript
    samples: Responses


Sampler = Callable[[Any, Sequence[str], jax.Array, Sequence[int]], Rollout]


def check_lengths(model: Model, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises a `UserError` unless a prompt and its response fit the context."""
    context = model.config.max_positions
    if prompt_tokens + max_new_tokens > context:
        raise UserError(
            f"prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens} make "
            f"{prompt_tokens + max_new_tokens} tokens, more than the model's context "
            f"of {context}; lower one of them"
        )


def check_engine(settings: Sampling, mesh: Mesh) -> None:
    """Raises a `UserError` for slots or a cache that cannot be."""
    if settings.slots < 0:
        raise UserError(
            f"slots={settings.slots} must be at least 0 (0: all responses at once)"
        )
    sharding.check_batch("slots", settings.slots, mesh)
    if settings.cache_dtype not in CACHE_DTYPES:
        raise UserError(
            f"cache_dtype={settings.cache_dtype!r} is unknown; take one of "
            f"{', '.join(map(repr, CACHE_DTYPES))}"
        )


def make_sampler(
    model: Model, tokenizer: Any, mesh: Mesh, *, prompt_tokens: int, **settings: Any
) -> Sampler:
    """Builds `sample(params, prompts, key, index) -> Rollout`, one compiled program.

    With G numbers in `index` for each prompt there are G responses to each, next to
    each other.

    Args:
      model: the policy's functions.
      tokenizer: the policy's tokenizer.
      mesh: where the arrays live.
      prompt_tokens: P, every prompt is padded to it; a longer one is an error.
      **settings: the other fields of `Sampling`.

    Returns:
      The sampler. Response i of a batch draws from `key` and `index[i]` alone.
    """
    special = special_tokens(tokenizer)
    check_vocabulary(tokenizer, model.config.vocab_size, "the policy")
    drawn_as = Sampling(eos_id=special.eos, pad_id=special.pad, **settings)
    check_lengths(model, prompt_tokens, drawn_as.max_new_tokens)
    check_engine(drawn_as, mesh)
    rows = sharding.rows(mesh)

    @jax.jit
    def draw(params, tokens, mask, key, index):
        keys = sample_keys(key, index)
        samples = generate(model, params, tokens, mask, keys, drawn_as)
        asked = repeat_rows((tokens, mask), len(index) // len(tokens))
        return Transcript(*asked, samples.tokens, samples.mask), samples

    def sample(params, prompts, key, index):
        sharding.check_batch("the number of prompts", len(prompts), mesh)
        host = encode_prompts(tokenizer, prompts, length=prompt_tokens)
        tokens, mask, index = sharding.to_devices(
            (*host, np.asarray(index, np.int32)), rows
        )
        transcript, samples = draw(params, tokens, mask, key, index)
        group = len(index) // len(prompts)

        def decode() -> list[str]:
            said = sharding.to_host((samples.tokens, samples.mask))
            return decode_responses(tokenizer, host[0][:, -1].repeat(group), *said)

        asked = [prompt for prompt in prompts for _ in range(group)]
        return Rollout(asked, Texts(decode), transcript, samples)

    return sample


def sampler_of(
    rollout: ConfigDict, model: Model, tokenizer: Any, mesh: Mesh
) -> Sampler:
    """The sampler that a config's `rollout` asks for."""
    found = set(Sampling._fields) - {"eos_id", "pad_id"}
    return make_sampler(
        model,
        tokenizer,
        mesh,
        prompt_tokens=rollout.prompt_tokens,
        **{name: rollout[name] for name in sorted(found)},
    )


def records(
    rollout: Rollout,
    scores: dict[str, np.ndarray],
    kl: np.ndarray,
    *,
    split: str,
    seed: int,
) -> list[dict[str, Any]]:
    """One row a sample, as runs keep them in `responses/`.

    Args:
      rollout: the batch.
      scores: [B] each: "reward", the total, and whatever else was measured.
      kl: [B] nats, Σ_t (log π − log π_ref).
      split: "train" or "heldout", where the prompts are from.
      seed: of the run.

    Returns:
      Rows with split, prompt, response, the scores, kl, tokens, finish, seed and index;
      phase, split, seed and index name the sample.
    """
    lengths, finished = sharding.to_host(
        (rollout.samples.mask.sum(axis=1), rollout.samples.finished)
    )
    return [
        {
            "split": split,
            "prompt": prompt,
            "response": response,
            **{name: float(values[i]) for name, values in scores.items()},
            "kl": float(kl[i]),
            "tokens": int(lengths[i]),
            "finish": "eos" if finished[i] else "length",
            "seed": seed,
            "index": i,
        }
        for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses))
    ]


def text_metrics(group: str, responses: Sequence[str]) -> dict[str, float]:
    """How much the responses repeat themselves and each other, as `<group>/...`."""
    repeated = [repeated_share(text) for text in responses]
    return {
        f"{group}/repeated": float(np.mean(repeated)),
        f"{group}/distinct_2": distinct(responses, 2),
    }

"""What a model says of given responses: their log-probabilities, for any trainer.

Dimension key: B rows, P prompt tokens, N response tokens, D model width; Z shards of C
states where the transcripts are packed, else B rows of N.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import sharding
from rlhf_jax.losses.logprobs import token_logprobs
from rlhf_jax.models.transformer import Model
from rlhf_jax.rollout import packing
from rlhf_jax.rollout.packing import Layout


class Transcript(NamedTuple):
    """Prompts and the responses to them.

    Attributes:
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool.
      responses: [B, N] int32, right-padded.
      mask: [B, N] bool, true on response tokens, EOS included.
      layout: how a forward pass packs them; None for one to a row.
    """

    prompts: jax.Array
    prompt_mask: jax.Array
    responses: jax.Array
    mask: jax.Array
    layout: Layout | None = None


class Scored(NamedTuple):
    """A forward pass over a transcript, at the response's positions.

    Attributes:
      logprobs: [B, N] float32, at the sampler's temperature; 0 under the mask.
      entropy: [B, N] float32, in nats; 0 under the mask.
      hidden: [Z, C, D], the states from which response tokens were predicted.
    """

    logprobs: jax.Array
    entropy: jax.Array
    hidden: jax.Array


def response_hidden(model: Model, params: Any, transcript: Transcript) -> jax.Array:
    """Hidden states [Z, C, D] from which each response token is predicted."""
    prompts, prompt_mask, responses, mask, layout = transcript
    tokens = jnp.concatenate([prompts, responses], axis=1)
    if layout is not None:
        return packing.predict(layout, tokens, functools.partial(model.apply, params))
    attended = jnp.concatenate([prompt_mask, mask], axis=1)
    hidden = model.apply(params, tokens, attended)
    return hidden[:, prompts.shape[1] - 1 : -1]


def score_responses(
    model: Model,
    params: Any,
    transcript: Transcript,
    *,
    temperature: float,
    chunk_size: int | None,
) -> Scored:
    """Log-probabilities and entropies of the responses.

    Args:
      model: the model's functions.
      params: its weights.
      transcript: what to score.
      temperature: the sampler's, so that sampler and learner speak of one policy.
      chunk_size: see `losses.token_logprobs`.
    """
    layout, mask = transcript.layout, transcript.mask
    hidden = response_hidden(model, params, transcript)
    said = transcript.responses, mask
    if layout is not None:
        said = packing.targets(layout, transcript.responses)
    logprobs, entropy = token_logprobs(
        hidden,
        model.unembedding(params),
        *said,
        temperature=temperature,
        chunk_size=packing.chunk_size(layout, chunk_size, len(mask)),
        logit_softcap=model.config.logit_softcap,
        batch_shards=sharding.batch_shards(),
        gather=sharding.gather_vocabulary,
    )
    spread = lambda values: packing.spread(layout, values, mask)
    return Scored(spread(logprobs), spread(entropy), hidden)

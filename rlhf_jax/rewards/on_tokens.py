"""A reward model that reads the policy's own tokens, where they lie.

No response is fetched, decoded, encoded and sent back before it is scored: with only
such rewards nothing of a phase waits for the host. The two need the same tokenizer. A
text may be cut into other tokens than it was sampled in, and then the score is a little
different from that of the text.

Dimension key: B rows, P prompt tokens, N response tokens, T = P + N + 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.data.tokenizer import special_tokens
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.labels import DEFAULT, Reading
from rlhf_jax.rewards.model import RewardModel, classify_sequences, score_statistics
from rlhf_jax.rollout.logprobs import Transcript


class TokenScore(NamedTuple):
    """What `rewards` need of it.

    Attributes:
      score: (transcript, finished [B] bool) -> [B] float32, on the mesh.
      vocabulary: token -> id.
      longest: tokens that the model has room for.
    """

    score: Callable[[Transcript, jax.Array], jax.Array]
    vocabulary: dict[str, int]
    longest: int


def whole_texts(
    transcript: Transcript, finished: jax.Array, eos: int
) -> tuple[jax.Array, jax.Array]:
    """Prompt, response and EOS from the first column on: tokens [B, T] and their mask.

    Every text ends with EOS, as in training, whether the response was cut off or not.
    """
    prompts, prompt_mask, responses, mask = transcript[:4]
    P = prompts.shape[1]
    start = P - prompt_mask.sum(axis=1)
    length = prompt_mask.sum(axis=1) + mask.sum(axis=1)
    tokens = jnp.concatenate([prompts, responses, responses[:, :1]], axis=1)
    column = jnp.arange(tokens.shape[1])[None, :]
    shifted = (column + start[:, None]) % tokens.shape[1]
    tokens = jnp.take_along_axis(tokens, shifted, axis=1)
    tokens = jnp.where(column == length[:, None], eos, tokens)
    length = length + ~finished
    return tokens, column < length[:, None]


def make_token_score(
    found: RewardModel, reading: Reading, *, normalize: bool
) -> TokenScore:
    """Builds the scorer of an open reward model.

    Raises:
      UserError: the reading is of texts.
    """
    if reading._replace(label=DEFAULT.label) != DEFAULT:
        raise UserError(
            f'{found.source}: "on": "tokens" gives the score of prompt and response as '
            "they are: leave text and output out"
        )
    mean, deviation = score_statistics(found, reading) if normalize else (0.0, 1.0)
    eos = special_tokens(found.tokenizer).eos

    @jax.jit
    def score(params: Any, transcript: Transcript, finished: jax.Array) -> jax.Array:
        tokens, mask = whole_texts(transcript, finished, eos)
        scores = classify_sequences(found.model, params, tokens, mask)[:, found.index]
        return (scores - mean) / deviation

    return TokenScore(
        lambda transcript, finished: score(found.params, transcript, finished),
        found.tokenizer.get_vocab(),
        found.model.config.max_positions,
    )


def check_token_score(name: str, scorer: TokenScore, tokenizer: Any, most: int) -> None:
    """Raises a `UserError` unless the policy's tokens mean the same to the scorer.

    Args:
      name: of the reward.
      scorer: what was built.
      tokenizer: the policy's.
      most: P + N, tokens of prompt and response.
    """
    if tokenizer.get_vocab() != scorer.vocabulary:
        raise UserError(
            f'reward {name!r} has "on": "tokens", and its tokenizer is not the '
            'policy\'s: take "text"'
        )
    if most + 1 > scorer.longest:
        raise UserError(
            f'reward {name!r} has "on": "tokens" and room for {scorer.longest} tokens, '
            f"but prompt, response and EOS may have {most + 1}: lower prompt_tokens or "
            "max_new_tokens"
        )

"""Whether a model still sees texts as its reference does: linear CKA of inner states.

Dimension key: B rows, T tokens of one, n real tokens of all, L layers, D model width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.models.transformer import Model
from rlhf_jax.rollout.logprobs import Transcript

MAX_TOKENS = 512  # the comparison grows with their square


class Probe(NamedTuple):
    """Texts, and what the reference makes of them.

    Attributes:
      transcript: prompts and responses on the mesh.
      chosen: [B, T] bool, the tokens whose states are compared, `MAX_TOKENS` at most.
      grams: [L, n, n] float64, the centred Gram matrices of the reference's states.
    """

    transcript: Transcript
    chosen: np.ndarray
    grams: np.ndarray


def make_probe(model: Model, reference: Any, transcript: Transcript) -> Probe:
    """The reference's states on the response tokens of a batch."""
    prompts = np.zeros(transcript.prompts.shape, bool)
    real = np.concatenate([prompts, sharding.to_host(transcript.mask)], axis=1)
    chosen = real & (np.cumsum(real).reshape(real.shape) <= MAX_TOKENS)
    return Probe(transcript, chosen, _grams(model, reference, transcript, chosen))


def similarity(model: Model, params: Any, probe: Probe) -> np.ndarray:
    """Linear CKA of each layer's states with the reference's, [L] float64 in 0..1.

    CKA(X, Y) = ⟨K, L⟩ / (‖K‖ ‖L‖),   K = HXXᵀH, L = HYYᵀH,   H = I − 11ᵀ/n

    1 is the same up to rotation and scale.

    References:
      Kornblith et al. 2019, equations 3 and 4, https://arxiv.org/abs/1905.00414
    """
    grams = _grams(model, params, probe.transcript, probe.chosen)
    inner = np.einsum("lij,lij->l", grams, probe.grams)
    norms = [np.sqrt(np.einsum("lij,lij->l", g, g)) for g in (grams, probe.grams)]
    return inner / np.maximum(norms[0] * norms[1], np.finfo(float).tiny)


def _grams(model, params, transcript, chosen) -> np.ndarray:
    states = sharding.to_host(_states(model, params, transcript))  # [B, L, T, D]
    rows = np.moveaxis(states, 1, 0)[:, chosen].astype(np.float64)  # [L, n, D]
    rows -= rows.mean(axis=1, keepdims=True)
    return np.einsum("lid,ljd->lij", rows, rows, optimize=True)


@functools.partial(jax.jit, static_argnums=0)
def _states(model: Model, params: Any, transcript: Transcript) -> jax.Array:
    """[B, L, T, D] float32; rows first, as they are spread over hosts."""
    tokens = jnp.concatenate([transcript.prompts, transcript.responses], axis=1)
    mask = jnp.concatenate([transcript.prompt_mask, transcript.mask], axis=1)
    layers = model.layer_states(params, tokens, mask)
    return jnp.moveaxis(layers, 0, 1).astype(jnp.float32)

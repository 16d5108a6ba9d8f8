"""Rollout: prompts to responses, and the log-probabilities they were drawn with."""

from rlhf_jax.rollout.generate import Responses, Sampling, generate
from rlhf_jax.rollout.sampling import sample_keys

__all__ = ["Responses", "Sampling", "generate", "sample_keys"]

"""Loss functions for alignment from human feedback: pure functions on arrays.

Nothing here needs more than jax and numpy. B sequences, T tokens: per-token results are
`[B, T]`, pair results `[B]`, always float32, and zero wherever the mask is False,
whatever stands there. Arrays come in the order new, old, advantage, mask;
hyper-parameters by keyword.

Losses are not averaged. Reduce with `masked.sum_and_count`, add the sums and the counts
over micro-batches and devices, and divide once.
"""

from rlhf_jax.losses import kl, masked
from rlhf_jax.losses.advantages import gae
from rlhf_jax.losses.logprobs import (
    TopTokens,
    logprobs_from_logits,
    token_logprobs,
    top_logprobs,
)
from rlhf_jax.losses.masked import sum_and_count, whiten
from rlhf_jax.losses.policy import (
    PolicyDiagnostics,
    adaptive_kl_coef,
    clipped_surrogate,
    clipped_value_loss,
    kl_shaped_rewards,
    missing_eos_penalty,
)
from rlhf_jax.losses.preference import bradley_terry
from rlhf_jax.losses.supervised import next_token_loss

__all__ = [
    "PolicyDiagnostics",
    "TopTokens",
    "adaptive_kl_coef",
    "bradley_terry",
    "clipped_surrogate",
    "clipped_value_loss",
    "gae",
    "kl",
    "kl_shaped_rewards",
    "logprobs_from_logits",
    "masked",
    "missing_eos_penalty",
    "next_token_loss",
    "sum_and_count",
    "token_logprobs",
    "top_logprobs",
    "whiten",
]

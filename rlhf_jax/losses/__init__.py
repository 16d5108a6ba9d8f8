"""Loss functions for alignment from human feedback: pure functions on arrays.

Nothing here needs more than jax and numpy. B sequences, T tokens: per-token results are
`[B, T]`, pair results `[B]`, float32, and zero wherever the mask is False, whatever
stands there; so a mask without a True gives zero, and never nan. What is a factor is
one there instead: `PolicyDiagnostics.ratio` and `wpo_weights`. What says which is not
float32: `TopTokens.tokens` is int32, what is clipped or correct is bool. An array
without entries raises. Arrays come in the order new, old, advantage, mask;
hyper-parameters by keyword. `LOSS_TYPES` and `DIVERGENCES` are tables: their keys are
the names that `dpo` takes.

Losses are not averaged. Reduce with `masked.sum_and_count`, add the sums and the counts
over micro-batches and devices, and divide once. Means are what is called so,
`masked.mean` and `masked.var`, and `kto_reference_point`.
"""

from rlhf_jax.losses import (
    aggregation,
    constrained,
    evolution,
    fitness,
    kl,
    masked,
    perturbations,
)
from rlhf_jax.losses.advantages import (
    discounted_returns,
    gae,
    over_tokens,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
)
from rlhf_jax.losses.cost_model import cost_model_loss, cost_model_token_loss
from rlhf_jax.losses.direct_preference import DIVERGENCES, dpo
from rlhf_jax.losses.distillation import (
    generalized_jsd,
    generalized_jsd_from_logits,
)
from rlhf_jax.losses.dpo_types import LOSS_TYPES
from rlhf_jax.losses.group_advantages import (
    group_relative,
    leave_one_out,
    opo,
    overlong_penalty,
)
from rlhf_jax.losses.importance import importance_weights
from rlhf_jax.losses.logprobs import logprobs_from_logits, token_logprobs
from rlhf_jax.losses.policy import (
    PolicyDiagnostics,
    adaptive_kl_coef,
    clipped_surrogate,
    clipped_value_loss,
    kl_shaped_rewards,
    missing_eos_penalty,
)
from rlhf_jax.losses.policy_variants import (
    Variant,
    cispo,
    gspo,
    gspo_token,
    sapo,
    variant,
)
from rlhf_jax.losses.preference import (
    PairRewards,
    bradley_terry,
    implicit_rewards,
    ld_logprobs,
    sequence_logprobs,
    wpo_weights,
)
from rlhf_jax.losses.reference_free import cpo, log_odds_ratio, orpo, simpo
from rlhf_jax.losses.supervised import dft, next_token_loss
from rlhf_jax.losses.token_summaries import (
    TopTokens,
    log_sum_squares,
    top_logprobs,
)
from rlhf_jax.losses.unpaired import apo_zero_unpaired, kto, kto_reference_point

__all__ = [
    "DIVERGENCES",
    "LOSS_TYPES",
    "PairRewards",
    "PolicyDiagnostics",
    "TopTokens",
    "Variant",
    "adaptive_kl_coef",
    "aggregation",
    "apo_zero_unpaired",
    "bradley_terry",
    "cispo",
    "clipped_surrogate",
    "clipped_value_loss",
    "constrained",
    "cost_model_loss",
    "cost_model_token_loss",
    "cpo",
    "dft",
    "discounted_returns",
    "dpo",
    "evolution",
    "fitness",
    "gae",
    "generalized_jsd",
    "generalized_jsd_from_logits",
    "group_relative",
    "gspo",
    "gspo_token",
    "implicit_rewards",
    "importance_weights",
    "kl",
    "kl_shaped_rewards",
    "kto",
    "kto_reference_point",
    "ld_logprobs",
    "leave_one_out",
    "log_odds_ratio",
    "log_sum_squares",
    "logprobs_from_logits",
    "masked",
    "missing_eos_penalty",
    "next_token_loss",
    "opo",
    "orpo",
    "over_tokens",
    "overlong_penalty",
    "perturbations",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "sapo",
    "sequence_logprobs",
    "simpo",
    "token_logprobs",
    "top_logprobs",
    "variant",
    "wpo_weights",
]

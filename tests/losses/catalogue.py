"""Every kernel with a mask, in a form that one test can call: `call(*arrays, mask)`.

A letter stands for each array, small for one entry a token [B, T], capital for one a
row [B]; the last is the mask, m or M. `DRAWS` says what the others are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax import losses
from rlhf_jax.losses import aggregation, constrained, fitness, kl, masked
from rlhf_jax.losses.dpo_types import LOSS_TYPES

D, V = 3, 7
UNEMBEDDING, REF_UNEMBEDDING = (
    np.random.default_rng(7).normal(size=(2, V, D)).astype(np.float32)
)
DRAWS = {
    # log-probabilities of tokens, near each other: ratios on both sides of a clip
    "l": lambda rng, shape: -np.exp(rng.normal(0.4, 0.3, shape)),
    "s": lambda rng, shape: rng.normal(-5.0, 2.0, shape),  # those of whole responses
    "x": lambda rng, shape: rng.normal(0.0, 1.0, shape),  # rewards, values, advantages
    "n": lambda rng, shape: rng.integers(1, 9, shape),  # lengths
    "p": lambda rng, shape: rng.random(shape),  # probabilities, weights
    "h": lambda rng, shape: rng.normal(size=(*shape, D)),  # hidden states
}


class Kernel(NamedTuple):
    """A kernel with its hyper-parameters given.

    `group` rows belong together. `whole_batch` is true where the result of a row
    depends on the other rows: such a batch cannot be cut into micro-batches.
    """

    call: Callable
    arrays: str
    group: int = 1
    whole_batch: bool = False

    def example(self, rng, groups, T):
        """(arrays, mask): left gaps, holes, right padding, a row with nothing real."""
        *kinds, mask_kind = self.arrays
        B = groups * self.group
        mask = rng.random(B if mask_kind == "M" else (B, T)) < 0.7
        mask[0] = True
        if B > 1:
            mask[-1] = False
        shapes = [(B,) if kind.isupper() else (B, T) for kind in kinds]
        arrays = [
            DRAWS[kind.lower()](rng, shape).astype(np.float32)
            for kind, shape in zip(kinds, shapes, strict=True)
        ]
        return arrays, mask


bind = functools.partial


def targets_like(mask):
    return jnp.broadcast_to(jnp.arange(mask.shape[1]) % D, mask.shape)


def from_hidden(function, **options):
    return lambda hidden, mask: function(
        hidden, UNEMBEDDING, mask, temperature=0.7, chunk_size=2, **options
    )


def from_logits(logits, mask):
    return losses.logprobs_from_logits(
        logits, targets_like(mask), mask, temperature=0.7
    )


def of_targets(hidden, mask):
    return losses.token_logprobs(
        hidden, UNEMBEDDING, targets_like(mask), mask, temperature=0.7, chunk_size=2
    )


def exact_kl(hidden, ref_hidden, mask):
    return kl.exact(
        hidden,
        UNEMBEDDING,
        ref_hidden,
        REF_UNEMBEDDING,
        mask,
        temperature=0.7,
        chunk_size=2,
    )


def jsd(hidden, teacher_hidden, mask):
    return losses.generalized_jsd(
        *(hidden, UNEMBEDDING, teacher_hidden, REF_UNEMBEDDING, mask),
        **{"beta": 0.3, "temperature": 0.7, "chunk_size": 2},
    )


def bradley_terry(chosen, rejected, margin, targets, mask):
    return losses.bradley_terry(
        chosen, rejected, mask, centering=0.01, margin=margin, targets=targets
    )


def kto(logprobs, ref_logprobs, label, mask, *, function=losses.kto, z_0=(0.4,)):
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    return function(logprobs, ref_logprobs, label > 0, *z_0, mask, beta=0.3, **weights)


def dpo(won, lost, ref_w, ref_l, n_w, n_l, weights, mask, *, loss_type, **options):
    return losses.dpo(
        *(won, lost, ref_w, ref_l, mask),
        beta=0.3,
        loss_type=loss_type,
        chosen_lengths=n_w,
        rejected_lengths=n_l,
        weights=None if LOSS_TYPES[loss_type].sorts else weights,
        **options,
    )


def smoothed(loss_type):
    """What "discopop" and "exo_pair" cannot do without, and some others can have."""
    if loss_type == "discopop":
        return {"tau": 0.5}
    return (
        {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust", "aot") else {}
    )


def safe(function):
    """A cost loss whose pairs are a safe and an unsafe response, or both unsafe."""

    def call(safer, unsafer, margin, mask):
        labels = margin > 0, jnp.zeros(len(margin), bool)
        return function(safer, unsafer, *labels, mask, regularization=0.05)

    return call


def ld(logprobs, others, mask):
    shorter = mask & (jnp.arange(mask.shape[1]) < 3)[None]
    return losses.ld_logprobs(logprobs, others, mask, shorter, alpha=0.4)


def wpo(logprobs, log_sum_squares, mask):
    return losses.wpo_weights(logprobs, mask, log_sum_squares=log_sum_squares)


def cpo_per_token(chosen, rejected, lengths, mask):
    return losses.cpo(
        chosen, rejected, mask, beta=0.3, nll_coef=0.7, chosen_lengths=lengths
    )


clip = {"clip_low": 0.2, "clip_high": 0.3}
weigh = {"low": 0.7, "high": 1.4}

KERNELS = {
    "masked.sum_and_count": Kernel(masked.sum_and_count, "xm"),
    "masked.sum": Kernel(masked.sum, "xm"),
    "masked.mean": Kernel(masked.mean, "xm", whole_batch=True),
    "masked.var": Kernel(masked.var, "xm", whole_batch=True),
    "masked.var of each row": Kernel(bind(masked.var, axis=1), "xm"),
    "masked.whiten": Kernel(
        bind(masked.whiten, shift_mean=True), "xm", whole_batch=True
    ),
    "masked.whiten unshifted": Kernel(
        bind(masked.whiten, shift_mean=False), "xm", whole_batch=True
    ),
    "logprobs.token_logprobs": Kernel(of_targets, "hm"),
    "logprobs.logprobs_from_logits": Kernel(from_logits, "hm"),
    "token_summaries.top_logprobs": Kernel(from_hidden(losses.top_logprobs, k=2), "hm"),
    "token_summaries.log_sum_squares": Kernel(
        from_hidden(losses.log_sum_squares), "hm"
    ),
    "kl.exact": Kernel(exact_kl, "hhm"),
    "kl.exact_from_logits": Kernel(bind(kl.exact_from_logits, temperature=0.7), "hhm"),
    "distillation.generalized_jsd": Kernel(jsd, "hhm"),
    "kl.k1": Kernel(kl.k1, "llm"),
    "kl.k2": Kernel(kl.k2, "llm"),
    "kl.k3": Kernel(kl.k3, "llm"),
    "kl.absolute": Kernel(kl.absolute, "llm"),
    "kl.straight_through": Kernel(kl.straight_through, "xllm"),
    "kl.estimate": Kernel(bind(kl.estimate, estimator="k3+"), "llm"),
    "advantages.gae": Kernel(bind(losses.gae, gamma=0.9, lam=0.8), "xxm"),
    "advantages.discounted_returns": Kernel(
        bind(losses.discounted_returns, gamma=0.9), "xm"
    ),
    "advantages.over_tokens": Kernel(losses.over_tokens, "Xm"),
    "advantages.reinforce_plus_plus": Kernel(
        bind(losses.reinforce_plus_plus, gamma=0.9), "xm", whole_batch=True
    ),
    "advantages.reinforce_plus_plus_baseline": Kernel(
        bind(losses.reinforce_plus_plus_baseline, group_size=2), "Xm", 2, True
    ),
    "advantages.remax": Kernel(bind(losses.remax, gamma=0.9), "xXm"),
    "group_advantages.opo": Kernel(bind(losses.opo, group_size=2), "Xm", 2),
    "group_advantages.leave_one_out": Kernel(
        bind(losses.leave_one_out, group_size=2), "XM", 2
    ),
    "policy.clipped_surrogate": Kernel(
        bind(losses.clipped_surrogate, **clip, dual_clip=3.0), "llxm"
    ),
    "policy.clipped_value_loss": Kernel(
        bind(losses.clipped_value_loss, clip_range=0.2), "xxxm"
    ),
    "policy.kl_shaped_rewards": Kernel(
        bind(losses.kl_shaped_rewards, kl_coef=0.1), "Xxm"
    ),
    "policy_variants.gspo": Kernel(bind(losses.gspo, **clip), "llXm"),
    "policy_variants.gspo_token": Kernel(bind(losses.gspo_token, **clip), "llxm"),
    "policy_variants.cispo": Kernel(
        bind(losses.cispo, ratio_min=0.8, ratio_max=1.3), "llxm"
    ),
    "policy_variants.sapo": Kernel(bind(losses.sapo, tau_pos=1.0, tau_neg=2.0), "llxm"),
    "preference.bradley_terry": Kernel(bradley_terry, "XXXPM"),
    "preference.sequence_logprobs": Kernel(losses.sequence_logprobs, "lm"),
    "preference.ld_logprobs": Kernel(ld, "llm"),
    "preference.wpo_weights": Kernel(losses.wpo_weights, "lm"),
    "preference.wpo_weights of a policy": Kernel(wpo, "llm"),
    "preference.implicit_rewards": Kernel(
        bind(losses.implicit_rewards, beta=0.3), "SSSSM"
    ),
    "unpaired.kto": Kernel(kto, "SSXM"),
    "unpaired.apo_zero_unpaired": Kernel(
        bind(kto, function=losses.apo_zero_unpaired, z_0=()), "SSXM"
    ),
    "unpaired.kto_reference_point": Kernel(
        losses.kto_reference_point, "SSM", whole_batch=True
    ),
    "reference_free.orpo": Kernel(bind(losses.orpo, beta=0.3), "LLM"),
    "reference_free.log_odds_ratio": Kernel(losses.log_odds_ratio, "LLM"),
    "reference_free.simpo": Kernel(
        bind(losses.simpo, beta=2.0, gamma=0.5, label_smoothing=0.1), "LLM"
    ),
    "reference_free.simpo alpha": Kernel(
        bind(losses.simpo, beta=0.5, gamma=0.5, alpha=0.25), "LLM"
    ),
    "reference_free.cpo": Kernel(bind(losses.cpo, beta=0.3, nll_coef=0.7), "SSM"),
    "reference_free.cpo per token": Kernel(cpo_per_token, "SSNM"),
    "supervised.next_token_loss": Kernel(losses.next_token_loss, "lm"),
    "supervised.dft": Kernel(losses.dft, "lm"),
    "cost_model.cost_model_loss": Kernel(safe(losses.cost_model_loss), "XXXM"),
    "cost_model.cost_model_token_loss": Kernel(
        safe(losses.cost_model_token_loss), "xxXm"
    ),
    "constrained.combined_advantage": Kernel(
        bind(constrained.combined_advantage, log_multiplier=0.4), "xxm"
    ),
    "fitness.z_score": Kernel(fitness.z_score, "XM", whole_batch=True),
    "fitness.z_score grouped": Kernel(
        bind(fitness.z_score, group_size=2), "XM", 2, whole_batch=True
    ),
    "fitness.centered_ranks": Kernel(fitness.centered_ranks, "XM", 1, True),
}
for scale in ("group", "batch", "none"):
    KERNELS[f"group_advantages.group_relative {scale}"] = Kernel(
        bind(losses.group_relative, group_size=2, scale=scale),
        "XM",
        group=2,
        whole_batch=scale == "batch",
    )
for mode in aggregation.MODES:
    KERNELS[f"aggregation.{mode}"] = Kernel(
        bind(aggregation.aggregate, mode=mode, max_length=9), "xm"
    )
for beta in (0.0, 0.3, 1.0):
    KERNELS[f"distillation.generalized_jsd_from_logits {beta}"] = Kernel(
        bind(losses.generalized_jsd_from_logits, beta=beta, temperature=0.7), "hhm"
    )
for level in ("token", "sequence"):
    for mode in ("truncate", "mask"):
        KERNELS[f"importance.importance_weights {level} {mode}"] = Kernel(
            bind(losses.importance_weights, level=level, mode=mode, **weigh), "llm"
        )
for loss_type, kind in LOSS_TYPES.items():
    KERNELS[f"dpo_types.{loss_type}"] = Kernel(
        bind(dpo, loss_type=loss_type, **smoothed(loss_type)),
        "SSSSNNPM",
        whole_batch=kind.sorts,
    )
for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
    alpha = 0.5 if divergence == "alpha" else None
    KERNELS[f"direct_preference.dpo {divergence}"] = Kernel(
        bind(dpo, loss_type="sigmoid", divergence=divergence, alpha=alpha), "SSSSNNPM"
    )

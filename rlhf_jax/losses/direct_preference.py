"""Direct preference optimization: one function, and every loss type it has a name for.

B pairs. y_w is the chosen response and y_l the rejected one;
s = log π(y) − log π_ref(y), so that β s is the reward the policy implies;
f = f′(π(y) / π_ref(y)), which is s under the reverse KL, and z = β (f_w − f_l).

Responses come in as sums over their tokens, from `sequence_logprobs`, or from
`ld_logprobs` for LD-DPO. The weights of WPO are from `wpo_weights`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    INF,
    TINY,
    check_range,
    check_rank,
    check_same_shape,
    float32,
    is_number,
    is_zero,
    mask_or_all,
)
from rlhf_jax.losses.dpo_types import LOSS_TYPES, Pairs

# exp(80) = 5.5e34 is still a float32. The same bound as in TRL.
MAX_EXPONENT = 80.0


def dpo(
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    ref_chosen_logprobs: jax.Array,
    ref_rejected_logprobs: jax.Array,
    mask: jax.Array | None = None,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
    tau: float | None = None,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Loss of a policy on each pair, against a frozen reference.

    s = log π(y) − log π_ref(y),   z = β (f_w − f_l)
    ℓ = −log σ(z) for "sigmoid"; each loss type's own equation is in its docstring

    A mix of types (MPO) is a weighted sum of calls. An option that the loss type does
    not have raises, lengths excepted: it would be ignored without a word.

    Args:
      chosen_logprobs: float [B], log π(y_w), summed over the response.
      rejected_logprobs: float [B], log π(y_l).
      ref_chosen_logprobs: float [B], log π_ref(y_w).
      ref_rejected_logprobs: float [B], log π_ref(y_l).
      mask: bool [B], True = a real pair; None when all are real.
      beta: β, above 0; a large one holds the policy to the reference.
      loss_type: a key of `LOSS_TYPES`: "sigmoid", "sigmoid_norm", "hinge", "ipo",
        "ipo_sum", "exo_pair", "robust", "nca_pair", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop" or "sft".
      label_smoothing: ε in [0, ½], the probability that a label is wrong.
      divergence: a key of `DIVERGENCES`, which gives f: "reverse_kl", "forward_kl",
        "js" or "alpha".
      alpha: α in (0, 1] of the divergence "alpha".
      tau: τ of "discopop", above 0; 0.05 in its paper.
      chosen_lengths: [B], tokens of y_w, for the types that average over tokens.
      rejected_lengths: [B], tokens of y_l.
      weights: float [B], of the pairs; None for 1. Not for the types that sort.

    Returns:
      float32 [B]; zero in masked slots. In nats, or in the unit of its type.

    Raises:
      ValueError: a shape does not fit, a name is unknown, a number is out of range,
        an option is missing, or one is given that the loss type does not have.

    References:
      Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290
    """
    given = (chosen_lengths, rejected_lengths, weights)
    _check_options(loss_type, label_smoothing, divergence, alpha, tau, *given)
    check_range("beta", beta, TINY, INF)
    check_rank("B", chosen_logprobs=chosen_logprobs)
    arrays = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "weights": weights,
    }
    check_same_shape(**{name: x for name, x in arrays.items() if x is not None})
    mask = mask_or_all(mask, "chosen_logprobs", chosen_logprobs)
    f = _slope(divergence, alpha)
    pairs = _clean(arrays, mask, f=f, beta=beta, epsilon=label_smoothing, tau=tau)
    loss = LOSS_TYPES[loss_type].function(pairs)
    if weights is not None:
        loss = jnp.where(pairs.mask, float32(weights), 1.0) * loss
    return jnp.where(pairs.mask, loss, 0.0)


def reverse_kl(s: jax.Array) -> jax.Array:
    """f′ of KL(π ‖ π_ref), that of DPO.

    f′(u) = log u = s   (+ 1, which cancels in a difference)

    Args:
      s: float32 [B], log u, the log-ratio of the policy over the reference.

    Returns:
      float32 [B], in nats.
    """
    return s


def forward_kl(s: jax.Array) -> jax.Array:
    """f′ of KL(π_ref ‖ π): the α-divergence of α = 1.

    f′(u) = 1 − 1/u

    Args:
      s: float32 [B], log u, the log-ratio of the policy over the reference.

    Returns:
      float32 [B], at most 1.
    """
    return alpha_divergence(s, alpha=1.0)


def js(s: jax.Array) -> jax.Array:
    """f′ of the Jensen-Shannon divergence.

    f′(u) = log(2u / (1 + u)) = log 2 + log σ(s)

    Args:
      s: float32 [B], log u, the log-ratio of the policy over the reference.

    Returns:
      float32 [B] in nats, at most log 2.
    """
    return float(np.log(2.0)) + jax.nn.log_sigmoid(s)


def alpha_divergence(s: jax.Array, *, alpha: float) -> jax.Array:
    """f′ of the α-divergence, between the reverse KL (α → 0) and the forward KL (1).

    f′(u) = (1 − u^−α) / α

    The exponent −α s is clamped from above at 80, beyond which there is no gradient.
    α is that of the paper: TRL 1.16 writes 1 − α for it.

    Args:
      s: float32 [B], log u, the log-ratio of the policy over the reference.
      alpha: α, above 0.

    Returns:
      float32 [B], at most 1/α.
    """
    return -jnp.expm1(jnp.minimum(-alpha * s, MAX_EXPONENT)) / alpha


# By the name that `dpo` takes. Wang et al. 2023 (f-DPO), table 1, https://arxiv.org/abs/2309.16240
DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js": js,
    "alpha": alpha_divergence,
}


def _slope(divergence, alpha):
    function = DIVERGENCES[divergence]
    return function if alpha is None else functools.partial(function, alpha=alpha)


def _clean(arrays, mask, **numbers):
    """`Pairs` from the arrays of `dpo`: harmless numbers where masked."""

    def logprobs(name):
        return jnp.where(mask, float32(arrays[f"{name}_logprobs"]), 0.0)

    def lengths(name):
        n = arrays[f"{name}_lengths"]
        return None if n is None else jnp.maximum(jnp.where(mask, float32(n), 1.0), 1.0)

    return Pairs(
        *(logprobs(name) for name in ("chosen", "rejected")),
        *(logprobs(name) for name in ("ref_chosen", "ref_rejected")),
        *(lengths(name) for name in ("chosen", "rejected")),
        mask,
        **numbers,
    )


def _check_options(
    loss_type,
    label_smoothing,
    divergence,
    alpha,
    tau,
    chosen_lengths,
    rejected_lengths,
    weights,
):
    for name, value, known in (
        ("loss_type", loss_type, LOSS_TYPES),
        ("divergence", divergence, DIVERGENCES),
    ):
        if value not in known:
            raise ValueError(
                f"{name} is {value!r}, expected one of {', '.join(known)}."
            )
    kind = LOSS_TYPES[loss_type]

    def fail(name, value, expected):
        raise ValueError(
            f"{name} is {value}, expected {expected} with loss_type {loss_type!r}."
        )

    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    if not kind.smooths and not is_zero(label_smoothing):
        fail("label_smoothing", label_smoothing, "0")
    if loss_type == "exo_pair" and is_zero(label_smoothing):
        fail("label_smoothing", label_smoothing, "a number above 0")
    half = is_number(label_smoothing) and label_smoothing == 0.5
    if loss_type == "robust" and half:
        fail("label_smoothing", label_smoothing, "a number below 0.5")
    if divergence != "reverse_kl" and not kind.diverges:
        fail("divergence", repr(divergence), "'reverse_kl'")
    if (alpha is None) == (divergence == "alpha"):
        expected = "a number" if alpha is None else "None"
        raise ValueError(
            f"alpha is {alpha}, expected {expected} with divergence {divergence!r}."
        )
    check_range("alpha", alpha, TINY, 1.0)
    if (tau is None) == (loss_type == "discopop"):
        fail("tau", tau, "a number" if tau is None else "None")
    check_range("tau", tau, TINY, INF)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    for name in kind.lengths:
        if lengths[name] is None:
            fail(name, None, "an array")
    if kind.sorts and weights is not None:
        fail("weights", "given", "None")

"""The loss types of `dpo`, each with its equation, and the table of their names.

B pairs. y_w is the chosen response and y_l the rejected one;
s = log π(y) − log π_ref(y), so that β s is the reward the policy implies;
f = f′(π(y) / π_ref(y)), which is s under the reverse KL, and z = β (f_w − f_l).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses._checks import float32
from rlhf_jax.losses.preference import bradley_terry


class Pairs(NamedTuple):
    """What a loss type sees: float32 [B], zero in masked slots, and the numbers.

    logp_w, logp_l, ref_w, ref_l: log π and log π_ref of both responses.
    n_w, n_l: their lengths in tokens, at least one; None where not given.
    mask: bool [B], True = a real pair.
    f: s -> f′(eˢ), the divergence's.
    beta, epsilon, tau: β, ε, τ.
    """

    logp_w: jax.Array
    logp_l: jax.Array
    ref_w: jax.Array
    ref_l: jax.Array
    n_w: jax.Array | None
    n_l: jax.Array | None
    mask: jax.Array
    f: Callable[[jax.Array], jax.Array]
    beta: float
    epsilon: float
    tau: float | None

    @property
    def s_w(self):
        """Log-ratio of the chosen responses."""
        return self.logp_w - self.ref_w

    @property
    def s_l(self):
        """Log-ratio of the rejected responses."""
        return self.logp_l - self.ref_l

    @property
    def z(self):
        """β (f_w − f_l)."""
        return self.beta * (self.f(self.s_w) - self.f(self.s_l))

    @property
    def mean_difference(self):
        """f_w / |y_w| − f_l / |y_l|."""
        return self.f(self.s_w) / self.n_w - self.f(self.s_l) / self.n_l


def sigmoid(x: Pairs) -> jax.Array:
    """The loss of DPO; with label smoothing, of conservative DPO.

    ℓ = −(1 − ε) log σ(z) − ε log σ(−z)

    TRL's "sigmoid" has no label smoothing; ours is that of OpenRLHF.

    References:
      Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290
      Mitchell 2023, equation 3, https://ericmitchell.ai/cdpo.pdf
    """
    return _logistic(x, x.z)


def sigmoid_norm(x: Pairs) -> jax.Array:
    """DPO on rewards per token, so that length wins nothing.

    ℓ = −(1 − ε) log σ(z̄) − ε log σ(−z̄),   z̄ = β (s_w / |y_w| − s_l / |y_l|)

    β is larger than for sums: 5 in the paper.

    References:
      Lambert et al. 2024 (Tülu 3), section 5, https://arxiv.org/abs/2411.15124
    """
    return _logistic(x, x.beta * x.mean_difference)


def hinge(x: Pairs) -> jax.Array:
    """The calibration loss of SLiC, with β for one over its margin.

    ℓ = max(0, 1 − z)

    References:
      Zhao et al. 2023, https://arxiv.org/abs/2305.10425
      On ratios: Liu et al. 2024 (RSO), https://arxiv.org/abs/2309.06657
    """
    return jax.nn.relu(1.0 - x.z)


def ipo(x: Pairs) -> jax.Array:
    """Identity preference optimization on rewards per token, as TRL has it.

    ℓ = (f_w / |y_w| − f_l / |y_l| − 1/(2β))²

    The paper has no length in it; TRL had from its authors that they averaged.

    References:
      Azar et al. 2023, equation 17, https://arxiv.org/abs/2310.12036
    """
    return jnp.square(x.mean_difference - 0.5 / x.beta)


def ipo_sum(x: Pairs) -> jax.Array:
    """Identity preference optimization on sums, as the equation is and OpenRLHF has it.

    ℓ = (f_w − f_l − 1/(2β))²

    References:
      Azar et al. 2023, equation 17, https://arxiv.org/abs/2310.12036
    """
    return jnp.square(x.f(x.s_w) - x.f(x.s_l) - 0.5 / x.beta)


def exo_pair(x: Pairs) -> jax.Array:
    """The KL divergence of the policy's preference from the smoothed label.

    q = σ(z)
    ℓ = q (log q − log(1 − ε)) + (1 − q) (log(1 − q) − log ε),   ε > 0

    References:
      Ji et al. 2024 (EXO), equation 16, https://arxiv.org/abs/2402.00856
    """
    log_q, log_1_q = jax.nn.log_sigmoid(x.z), jax.nn.log_sigmoid(-x.z)
    epsilon = float32(x.epsilon)
    won = jnp.exp(log_q) * (log_q - jnp.log1p(-epsilon))
    return won + jnp.exp(log_1_q) * (log_1_q - jnp.log(epsilon))


def robust(x: Pairs) -> jax.Array:
    """DPO made unbiased under labels that are wrong with probability ε.

    ℓ = (−(1 − ε) log σ(z) + ε log σ(−z)) / (1 − 2ε),   ε < ½

    References:
      Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409
    """
    as_labelled = (x.epsilon - 1.0) * jax.nn.log_sigmoid(x.z)
    flipped = x.epsilon * jax.nn.log_sigmoid(-x.z)
    return (as_labelled + flipped) / (1.0 - 2.0 * x.epsilon)


def nca_pair(x: Pairs) -> jax.Array:
    """Noise-contrastive alignment: likelihoods count, not their margin alone.

    ℓ = −log σ(β s_w) − ½ log σ(−β s_w) − ½ log σ(−β s_l)

    References:
      Chen et al. 2024, https://arxiv.org/abs/2402.05369
    """
    r_w, r_l = x.beta * x.s_w, x.beta * x.s_l
    contrast = jax.nn.log_sigmoid(-r_w) + jax.nn.log_sigmoid(-r_l)
    return -jax.nn.log_sigmoid(r_w) - 0.5 * contrast


def bco_pair(x: Pairs) -> jax.Array:
    """Binary classifier optimization, each response a label of its own.

    ℓ = −log σ(β s_w) − log σ(−β s_l)

    The paper's running reward shift δ is left out, as in TRL's pair form.

    References:
      Jung et al. 2024, https://arxiv.org/abs/2404.04656
    """
    return -jax.nn.log_sigmoid(x.beta * x.s_w) - jax.nn.log_sigmoid(-x.beta * x.s_l)


def sppo_hard(x: Pairs) -> jax.Array:
    """Self-play preference optimization with win probabilities of one and zero.

    ℓ = (s_w − 1/(2β))² + (s_l + 1/(2β))²

    References:
      Wu et al. 2024, algorithm 1, https://arxiv.org/abs/2405.00675
    """
    target = 0.5 / x.beta
    return jnp.square(x.s_w - target) + jnp.square(x.s_l + target)


def aot(x: Pairs) -> jax.Array:
    """Alignment by optimal transport: the sorted margins should exceed the reference's.

    m = log π(y_w) − log π(y_l), m_ref likewise;   d = m − (m_ref of the same rank)
    ℓ = −(1 − ε) log σ(β d) − ε log σ(−β d)

    The ranks are over the batch that is given: a loss per micro-batch is another loss.

    References:
      Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
    """
    m, m_ref = x.logp_w - x.logp_l, x.ref_w - x.ref_l
    return _logistic(x, x.beta * (m - _of_same_rank(m_ref, m, x.mask)))


def aot_unpaired(x: Pairs) -> jax.Array:
    """Alignment by optimal transport: sorted chosen rewards over sorted rejected ones.

    d = s_w − (the s_l of the same rank)
    ℓ = −(1 − ε) log σ(β d) − ε log σ(−β d)

    The ranks are over the batch that is given; the loss stands in the slot of y_w.

    References:
      Melnyk et al. 2024, https://arxiv.org/abs/2406.05882
    """
    return _logistic(x, x.beta * (x.s_w - _of_same_rank(x.s_l, x.s_w, x.mask)))


def apo_zero(x: Pairs) -> jax.Array:
    """Anchored: raise the chosen, lower the rejected, both about the reference.

    ℓ = 1 − σ(β s_w) + σ(β s_l)

    References:
      D'Oosterlinck et al. 2024, equation 7, https://arxiv.org/abs/2408.06266
    """
    return jax.nn.sigmoid(-x.beta * x.s_w) + jax.nn.sigmoid(x.beta * x.s_l)


def apo_down(x: Pairs) -> jax.Array:
    """Anchored, for a policy better than its data: lower both, the rejected more.

    ℓ = σ(β s_w) + 1 − σ(β (s_w − s_l))

    References:
      D'Oosterlinck et al. 2024, equation 8, https://arxiv.org/abs/2408.06266
    """
    return jax.nn.sigmoid(x.beta * x.s_w) + jax.nn.sigmoid(x.beta * (x.s_l - x.s_w))


def discopop(x: Pairs) -> jax.Array:
    """The loss that a language model discovered: logistic below, exponential above.

    m = σ(z / τ)
    ℓ = −(1 − m) log σ(z) + m e⁻ᶻ

    References:
      Lu et al. 2024, equation 5, https://arxiv.org/abs/2406.08414
    """
    logistic = -jax.nn.sigmoid(-x.z / x.tau) * jax.nn.log_sigmoid(x.z)
    # In logarithms: far below zero e⁻ᶻ overflows, while the product vanishes.
    return logistic + jnp.exp(jax.nn.log_sigmoid(x.z / x.tau) - x.z)


def sft(x: Pairs) -> jax.Array:
    """Cross-entropy of the chosen response, per token.

    ℓ = −log π(y_w) / |y_w|

    Averaged over pairs this is a mean of means; TRL's is the mean over all tokens,
    Σ ℓ |y_w| / Σ |y_w|, which is `next_token_loss`.

    References:
      Pang et al. 2024 (the NLL of RPO), https://arxiv.org/abs/2404.19733
    """
    return -x.logp_w / x.n_w


class LossType(NamedTuple):
    """A loss type, and which options of `dpo` have a meaning for it.

    function: `Pairs` -> float32 [B].
    smooths: takes label_smoothing.  diverges: takes divergence.  sorts: over the batch.
    lengths: the names of the lengths it needs.
    """

    function: Callable[[Pairs], jax.Array]
    smooths: bool = False
    diverges: bool = False
    sorts: bool = False
    lengths: tuple[str, ...] = ()


BOTH = ("chosen_lengths", "rejected_lengths")
LOSS_TYPES = {
    "sigmoid": LossType(sigmoid, smooths=True, diverges=True),
    "sigmoid_norm": LossType(sigmoid_norm, smooths=True, lengths=BOTH),
    "hinge": LossType(hinge, diverges=True),
    "ipo": LossType(ipo, diverges=True, lengths=BOTH),
    "ipo_sum": LossType(ipo_sum, diverges=True),
    "exo_pair": LossType(exo_pair, smooths=True, diverges=True),
    "robust": LossType(robust, smooths=True, diverges=True),
    "nca_pair": LossType(nca_pair),
    "bco_pair": LossType(bco_pair),
    "sppo_hard": LossType(sppo_hard),
    "aot": LossType(aot, smooths=True, sorts=True),
    "aot_unpaired": LossType(aot_unpaired, smooths=True, sorts=True),
    "apo_zero": LossType(apo_zero),
    "apo_down": LossType(apo_down),
    "discopop": LossType(discopop, diverges=True),
    "sft": LossType(sft, lengths=BOTH[:1]),
}


def _logistic(x, z):
    """−(1 − ε) log σ(z) − ε log σ(−z)."""
    zeros = jnp.zeros_like(z)
    return bradley_terry(z, zeros, x.mask, centering=0.0, targets=1.0 - x.epsilon)


def _of_same_rank(others, values, mask):
    """For each real value, that of `others` with the same rank among the real ones."""
    # Masked slots sort to the end, so they move no rank of a real one.
    ranks = jnp.argsort(jnp.argsort(jnp.where(mask, values, jnp.inf)))
    matched = jnp.sort(jnp.where(mask, others, jnp.inf))[ranks]
    return jnp.where(mask, matched, 0.0)

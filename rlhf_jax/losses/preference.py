"""Losses on pairs of responses, of which one is preferred.

B pairs.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses._checks import (
    boolean,
    check_range,
    check_rank,
    check_same_shape,
    check_shape,
    float32,
)


def bradley_terry(
    chosen: jax.Array,
    rejected: jax.Array,
    mask: jax.Array | None = None,
    *,
    centering: float,
    margin: jax.Array | None = None,
    targets: jax.Array | float | None = None,
) -> jax.Array:
    """Loss of a reward model on each pair: the chosen response should score higher.

    x = r_c − r_r − m
    ℓ = −p log σ(x) − (1 − p) log σ(−x) + κ (r_c + r_r)²

    Args:
      chosen: float [B], r_c, the reward of the preferred response.
      rejected: float [B], r_r, the reward of the other.
      mask: bool [B], True = a real pair; None when all are real.
      centering: κ; above 0 it pulls the mean reward to zero, which the pairs leave
        free. 0.01 is common, 0 turns it off.
      margin: float [B], m, by how much the chosen one is better; None for 0.
      targets: p, the probability that the chosen one is preferred, float [B] of soft
        labels or a number: 1 − ε for label smoothing ε. None for 1.

    Returns:
      float32 [B] in nats; zero in masked slots.

    Raises:
      ValueError: a shape does not fit, or a number is out of range.

    References:
      Ouyang et al. 2022, equation 1, https://arxiv.org/abs/2203.02155
      Margin: Llama 2, equation 2, https://arxiv.org/abs/2307.09288
      Centering: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244
      Soft labels: Bai et al. 2022 (Constitutional AI), section 4.1,
      https://arxiv.org/abs/2212.08073
    """
    check_rank("B", chosen=chosen)
    arrays = {"rejected": rejected, "mask": mask, "margin": margin}
    given = {name: x for name, x in arrays.items() if x is not None}
    check_same_shape(chosen=chosen, **given)
    check_range("centering", centering, 0.0, float("inf"))
    check_range("targets", targets, 0.0, 1.0)
    if targets is not None and np.ndim(targets) != 0:
        check_shape("targets", targets, np.shape(chosen), "the shape of chosen")

    mask = jnp.ones(np.shape(chosen), bool) if mask is None else boolean(mask)
    r_c, r_r, m, p = (
        jnp.where(mask, float32(x), 0.0)
        for x in (
            chosen,
            rejected,
            0.0 if margin is None else margin,
            1.0 if targets is None else targets,
        )
    )
    x = r_c - r_r - m
    loss = -p * jax.nn.log_sigmoid(x) - (1.0 - p) * jax.nn.log_sigmoid(-x)
    return jnp.where(mask, loss + centering * jnp.square(r_c + r_r), 0.0)

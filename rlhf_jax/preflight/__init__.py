"""How much memory a run needs on each device, told before its programs are compiled."""

from rlhf_jax.preflight.advice import advise, capacity, rows
from rlhf_jax.preflight.needs import Estimate, estimate

__all__ = ["Estimate", "advise", "capacity", "estimate", "rows"]

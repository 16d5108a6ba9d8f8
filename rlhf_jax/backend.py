"""What programs are written for; some forms are fast on one kind of device alone."""

import jax


def on_cpu() -> bool:
    """Whether programs run on CPUs."""
    return jax.default_backend() == "cpu"


def on_tpu() -> bool:
    """Whether programs run on TPUs."""
    return jax.default_backend() == "tpu"

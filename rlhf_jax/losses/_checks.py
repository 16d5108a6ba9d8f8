"""What every kernel does to its arguments before the equation: shapes and float32."""

import jax
import jax.numpy as jnp
import numpy as np

# The smallest normal float32: the lower bound of what must be above zero.
TINY = float(np.finfo(np.float32).tiny)


def float32(x: jax.typing.ArrayLike) -> jax.Array:
    """Return `x` as float32, whatever its dtype."""
    return jnp.asarray(x, dtype=jnp.float32)


def boolean(mask: jax.typing.ArrayLike) -> jax.Array:
    """Return `mask` as bool: every non-zero entry is True."""
    return jnp.asarray(mask).astype(bool)


def check_rank(key: str, **arrays: jax.typing.ArrayLike) -> None:
    """Raise ValueError unless every named array has the dimensions of `key`.

    Args:
      key: dimension letters with spaces between, such as "B T".
      **arrays: the arrays by argument name.

    Raises:
      ValueError: names the first array with another rank, or with nothing in it, its
        shape and `key`.
    """
    names = key.split()
    for name, array in arrays.items():
        if np.ndim(array) != len(names):
            raise ValueError(
                f"{name} has shape {np.shape(array)}, expected [{', '.join(names)}]."
            )
        if 0 in np.shape(array):
            raise ValueError(
                f"{name} has shape {np.shape(array)}, expected [{', '.join(names)}] "
                "with at least one entry."
            )


def check_same_shape(**arrays: jax.typing.ArrayLike) -> None:
    """Raise ValueError unless all named arrays have the shape of the first.

    Raises:
      ValueError: names the first array that differs, its shape and the expected one, or
        the first array if it has no entries.
    """
    (first, array), *others = arrays.items()
    if 0 in np.shape(array):
        raise ValueError(
            f"{first} has shape {np.shape(array)}, expected at least one entry."
        )
    for name, other in others:
        check_shape(name, other, np.shape(array), f"the shape of {first}")


def check_shape(
    name: str, array: jax.typing.ArrayLike, expected: tuple[int, ...], source: str
) -> None:
    """Raise ValueError unless `array` has the `expected` shape, which is `source`."""
    if np.shape(array) != tuple(expected):
        raise ValueError(
            f"{name} has shape {np.shape(array)}, expected {tuple(expected)}, {source}."
        )


def check_range(name: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high.

    A traced or array value passes: only numbers known to Python or numpy are compared.
    """
    if isinstance(value, (int, float, np.number)) and not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected a number in [{low}, {high}].")

"""What every kernel does to its arguments before the equation: shapes and float32."""

import jax
import jax.numpy as jnp
import numpy as np

# The smallest normal float32: the lower bound of what must be above zero. The largest:
# the upper bound of what must be finite.
TINY, MAX = (float(getattr(np.finfo(np.float32), x)) for x in ("tiny", "max"))
INF = float("inf")


def float32(x: jax.typing.ArrayLike) -> jax.Array:
    """Return `x` as float32, whatever its dtype."""
    return jnp.asarray(x, dtype=jnp.float32)


def boolean(name: str, mask: jax.typing.ArrayLike) -> jax.Array:
    """Return the named mask as bool: every non-zero integer is True.

    Raises:
      ValueError: the mask is of floats. They are more often another argument in its
        place, or the 0 and -1e9 of attention, than a mask.
    """
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise ValueError(f"{name} is {mask.dtype}, expected bool or int.")
    return mask.astype(bool)


def given_mask(
    mask: jax.typing.ArrayLike | None, shape: tuple[int, ...], source: str
) -> jax.Array | None:
    """Return the checked mask as bool, or None where None is given."""
    if mask is None:
        return None
    check_shape("mask", mask, shape, source)
    return boolean("mask", mask)


def mask_or_all(
    mask: jax.typing.ArrayLike | None, name: str, array: jax.typing.ArrayLike
) -> jax.Array:
    """Return the mask as bool in the shape of the named array; None is all True."""
    given = given_mask(mask, np.shape(array), f"the shape of {name}")
    return jnp.ones(np.shape(array), bool) if given is None else given


def check_labels(**labels: jax.typing.ArrayLike) -> None:
    """Raise ValueError unless all are bool: the labels ±1 would both count as True."""
    for name, label in labels.items():
        dtype = jnp.asarray(label).dtype
        if dtype != jnp.bool_:
            raise ValueError(f"{name} is {dtype}, expected bool.")


def check_float(name: str, array: object) -> None:
    """Raise ValueError unless `array` has a dtype, and it is a float one."""
    found = getattr(array, "dtype", f"a Python {type(array).__name__}")
    if isinstance(found, str) or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{name} is {found}, expected a float dtype.")


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


def is_number(value: object) -> bool:
    """Whether `value` is a number to Python or numpy, which a bool is not here."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def is_zero(value: object) -> bool:
    """Whether `value` is the number 0; an array is not known to be."""
    return is_number(value) and value == 0


def check_scalars(**values: object) -> None:
    """Raise ValueError unless each is a number or an array without dimensions."""
    for name, value in values.items():
        if isinstance(value, (jax.Array, np.ndarray)):
            check_shape(name, value, (), "a scalar")
        elif not is_number(value):
            raise ValueError(f"{name} is {value!r}, expected a number.")


def check_range(name: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high.

    None passes, and so does a scalar array, whose value may not be known yet.

    Raises:
      ValueError: the value is out of range, or is neither a number nor a scalar array.
    """
    if value is None:
        return
    check_scalars(**{name: value})
    if is_number(value) and not low <= _python(value) <= high:
        raise ValueError(f"{name} is {value}, expected a number in [{low}, {high}].")


def check_whole(
    name: str, value: object, low: int, expected: str = "", multiple: int = 0
) -> None:
    """Raise ValueError unless `value` is an integer of at least `low`.

    Args:
      name: of the argument.
      value: a Python or numpy integer.
      low: the least that is allowed, at least 1 with a multiple.
      expected: what else the message is to say, such as ", or None".
      multiple: what the value has to divide; anything does divide 0.
    """
    whole = is_number(value) and isinstance(value, (int, np.integer))
    if not whole or value < low or multiple % max(value, 1):
        raise ValueError(
            f"{name} is {value}, expected a whole number of at least {low}{expected}."
        )


def check_integer(name: str, array: jax.typing.ArrayLike) -> None:
    """Raise ValueError unless `array` is of integers."""
    dtype = jnp.asarray(array).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} is {dtype}, expected an integer dtype.")


def _python(number):
    """Its value as Python has it: a float16 cannot be compared with TINY."""
    return number.item() if isinstance(number, np.number) else number

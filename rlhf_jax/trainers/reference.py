"""What the reference says of fixed rows: computed once, and kept in the run's folder.

An algorithm that learns from fixed responses asks its frozen reference about the same
rows in every epoch. Asked once, before the first phase, the reference is not needed
again, and no second copy of the weights is in memory while the policy learns.

Dimension key: N rows.
"""

import hashlib
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from rlhf_jax import progress, sharding

SECONDS_BETWEEN_LINES = 10.0


def reference_logprobs(
    score: Callable[[Any, Any], jax.Array],
    params: Any,
    split: str,
    rows: Any,
    *,
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    batch: int,
    mesh: Mesh,
    console: Console,
) -> np.ndarray:
    """`score(params, rows)` of all rows, from `folder` if the same was asked before.

    A file holds the array and a key of what it came from. Only process 0 reads and
    writes it; every host ends with the same array.

    Args:
      score: a compiled function (params, [batch, ...] rows) -> [batch, ...] float32.
      params: the reference's weights.
      split: names the file.
      rows: a pytree of NumPy arrays [N, ...], on every host.
      folder: where the file is.
      settings: whatever else the numbers depend on, JSON values.
      batch: rows a call; the last call is filled up.
      mesh: where the arrays live.
      console: is told how far it is.

    Returns:
      float32 [N, ...].
    """
    path = folder / f"{split}.npz"
    key = _key(params, rows, settings)
    count = len(jax.tree.leaves(rows)[0])
    some = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), rows
    )
    shape = (count, *jax.eval_shape(score, params, some).shape[1:])
    found = _shared(_read(path, key, shape), shape)
    if found is not None:
        progress.say(console, f"reference log-probabilities: read from {path}")
        return found
    found = _compute(score, params, split, rows, batch, mesh, console)
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        with beside.open("wb") as file:
            np.savez(file, key=key, logprobs=found)
        os.replace(beside, path)
    return found


@jax.jit
def fingerprint(params: Any) -> jax.Array:
    """[leaves, 2] uint32, sums over hashes of (bits, place), the same on every mesh.

    Sums of integers are the same in any order, so no weight has to leave its device.
    The hash is the finalizer of MurmurHash3.
    """

    def mix(x):
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def sums(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * np.uint32(size) + index
        salts = (np.uint32(0), np.uint32(0x9E3779B9))
        return jnp.stack([mix(bits + mix(place ^ salt)).sum() for salt in salts])

    return jnp.stack([sums(leaf) for leaf in jax.tree.leaves(params)])


def _key(params: Any, rows: Any, settings: Mapping[str, Any]) -> str:
    """A hash of everything that the log-probabilities depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    weights = sharding.to_host(fingerprint(params))
    for array in (weights, *jax.tree.leaves(rows)):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(path: pathlib.Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in the file, on process 0, if the file is whole and of this key."""
    if jax.process_index() != 0 or not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as saved:
            same = str(saved["key"]) == key and saved["logprobs"].shape == shape
            return saved["logprobs"] if same else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # cut short by a kill: computed again


def _shared(found: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """What process 0 found, on every host."""
    if jax.process_count() == 1:
        return found
    send = multihost_utils.broadcast_one_to_all
    if not send(np.bool_(found is not None)):
        return None
    return np.asarray(send(np.zeros(shape, np.float32) if found is None else found))


def _compute(score, params, split, rows, batch, mesh, console) -> np.ndarray:
    count = len(jax.tree.leaves(rows)[0])
    parts, started = [], time.monotonic()
    told = started
    for first in range(0, count, batch):
        index = np.arange(first, first + batch) % count
        part = jax.tree.map(lambda x, i=index: x[i], rows)
        part = sharding.to_devices(part, sharding.rows(mesh))
        parts.append(sharding.to_host(score(params, part)))
        now, done = time.monotonic(), min(first + batch, count)
        if done == count or now - told > SECONDS_BETWEEN_LINES:
            left = (now - started) * (count - done) / done
            text = f"reference log-probabilities: {done:,}/{count:,} {split} rows"
            progress.say(console, text + (f", {left:.0f} s left" if left else ""))
            told = now
    return np.concatenate(parts)[:count]

"""Reads checkpoint tensors into our leaves, by the rows of weight_names.py.

Weights stream: each leaf is assembled on its own, straight into its target sharding, so
that a model never lies in host memory twice.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.model_files import Tensor
from rlhf_jax.models.weight_names import Row

FLOATS = ("F64", "F32", "F16", "BF16")


def target_shardings(abstract: Any, mesh: Mesh | None) -> Any:
    """Where each leaf goes: by the table of sharding.py, or the first device."""
    if mesh is not None:
        return sharding.param_shardings(abstract, mesh)
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: here, abstract)


def read_params(
    directory: Path,
    rows: Sequence[Row],
    tensors: Mapping[str, Tensor],
    config: Any,
    abstract: Any,
    *,
    targets: Any,
    spare: re.Pattern,
) -> Any:
    """The parameters of a checkpoint, float32.

    Args:
        directory: named in errors.
        rows: which tensor is which leaf.
        tensors: from `open_tensors`.
        config: handed to the rows' transforms; has `num_layers`.
        abstract: the tree of `ShapeDtypeStruct`s to fill.
        targets: a sharding for each leaf.
        spare: matches names of tensors that may be there and are not read.

    Raises:
        UserError: missing, unexpected, misshapen or non-float tensors.
    """
    _check_tensors(directory, rows, tensors, config, abstract, spare)
    readers = _readers(rows, tensors, config)

    def place(path, leaf, target):
        read = functools.partial(_read_leaf, readers[sharding.path_string(path)], leaf)
        return jax.make_array_from_callback(leaf.shape, target, read)

    return jax.tree_util.tree_map_with_path(place, abstract, targets)


def tensor_names(row: Row, config: Any) -> list[str]:
    """The tensors of a row: one, or one a layer."""
    if "{}" not in row.name:
        return [row.name]
    return [row.name.format(layer) for layer in range(config.num_layers)]


def leaves_by_path(params: Any) -> dict[str, Any]:
    """Leaves by their path, as "layers/mlp/up/kernel"."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return {sharding.path_string(path): leaf for path, leaf in found}


def tensor_shape(row: Row, config: Any, leaves: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of each tensor of a row, from our leaves' shapes."""
    layered = "{}" in row.name
    shapes = [leaves[path].shape[1 if layered else 0 :] for path in row.paths]
    parts = tuple(np.broadcast_to(np.float32(0), shape) for shape in shapes)
    return row.transform.join(parts, config).shape


def _check_tensors(directory, rows, tensors, config, abstract, spare):
    """Refuse missing, unexpected, misshapen and non-float tensors."""
    leaves = leaves_by_path(abstract)
    rows = [row for row in rows if all(path in leaves for path in row.paths)]
    expected = {
        name: shape
        for row in rows
        for shape in [tensor_shape(row, config, leaves)]
        for name in tensor_names(row, config)
    }
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(f"{directory} lacks {_few(missing)}.")
    unexpected = [
        name for name in tensors if name not in expected and not spare.search(name)
    ]
    if unexpected:
        raise UserError(
            f"{directory} holds tensors that its config.json has no place for: "
            f"{_few(unexpected)}."
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"{name} in {directory} has shape {tensor.shape}; its config.json "
                f"means {shape}."
            )
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{name} in {directory} is stored as {tensor.dtype}; supported are "
                f"{', '.join(FLOATS)}."
            )


def _few(names):
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _readers(rows, tensors, config):
    """For each leaf, one function a layer (or a single one) that reads its values."""

    def reader(row, name, part):
        tensor = tensors[name]
        # The name in the file: a table of tensors may have another for it.
        return lambda: row.transform.split(tensor.file.get_tensor(tensor.name), config)[
            part
        ]

    return {
        path: (
            "{}" in row.name,
            [reader(row, name, part) for name in tensor_names(row, config)],
        )
        for row in rows
        for part, path in enumerate(row.paths)
        if all(name in tensors for name in tensor_names(row, config))
    }


def _read_leaf(readers, leaf, index):
    """The slice `index` of a leaf, float32, read layer by layer."""
    layered, reads = readers
    if not layered:
        return np.ascontiguousarray(reads[0]()[index], np.float32)
    layers = range(leaf.shape[0])[index[0]]
    slices = (np.asarray(reads[layer]()[index[1:]], np.float32) for layer in layers)
    first = next(slices)
    values = np.empty((len(layers), *first.shape), np.float32)
    values[0] = first
    for layer, value in enumerate(slices, 1):
        values[layer] = value
    return values

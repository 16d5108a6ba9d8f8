"""The whole parallel plan: one mesh, one table, and what follows from them.

Axes of the mesh:
    data     copies of the model, each on its own rows of the batch
    fsdp     rows of the batch too; parameters and optimizer state are cut over it
    tensor   attention heads, feed-forward width and vocabulary are cut over it

A parameter's path is matched against `RULES`, which names the logical axis of each
of its dimensions; `MESH_AXES` maps those onto the mesh. Everything runs on a mesh,
a single device being the mesh 1 x 1 x 1.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

MESH_AXES = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    None: None,
}

RULES = (
    (r"embed/tokens", ("vocab", "embed")),
    (r"embed/positions", (None, "embed")),
    (r"layers/.*norm/(scale|bias)", ("layers", None)),
    (r"layers/attention/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"layers/attention/(query|key|value)/bias", ("layers", "heads")),
    (r"layers/attention/out/kernel", ("layers", "heads", "embed")),
    (r"layers/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/(gate|up)/bias", ("layers", "mlp")),
    (r"layers/mlp/down/kernel", ("layers", "mlp", "embed")),
    (r"layers/(attention/out|mlp/down)/bias", ("layers", None)),
    # Low-rank adapters: A [in, r], B [r, out].
    (
        r"layers/(attention/(query|key|value)|mlp/(gate|up))/lora_a",
        ("layers", "embed", None),
    ),
    (r"layers/attention/(query|key|value)/lora_b", ("layers", None, "heads")),
    (r"layers/mlp/(gate|up)/lora_b", ("layers", None, "mlp")),
    (r"layers/attention/out/lora_a", ("layers", "heads", None)),
    (r"layers/mlp/down/lora_a", ("layers", "mlp", None)),
    (r"layers/(attention/out|mlp/down)/lora_b", ("layers", None, "embed")),
    (r"final_norm/(scale|bias)", (None,)),
    (r"unembed/kernel", ("vocab", "embed")),
    (r"score/kernel", ("embed", None)),
    (r"score/bias", (None,)),
    # Encoders that classify.
    (r"embed/types", (None, "embed")),
    (r"embed_norm/(scale|bias)", (None,)),
    (r"classifier/(dense|out)/kernel", ("embed", None)),
    (r"classifier/(dense|out)/bias", (None,)),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Builds the mesh over all devices of all hosts.

    Within a slice (chips of a TPU pod that are wired to each other, GPUs of a host)
    devices talk much faster than between slices. `tensor` never leaves a slice, and
    where there are several, `data` alone goes over them. GPUs may have `fsdp` across
    hosts too, where `data` does not divide: over their network it costs less.

    Args:
      data: size of the `data` axis; -1 in one place means "what is left".
      fsdp: size of the `fsdp` axis.
      tensor: size of the `tensor` axis.
      devices: of all hosts; None takes those that JAX finds.

    Returns:
      A mesh with the axes `("data", "fsdp", "tensor")`, all of them Auto.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or an axis that
        has to stay inside a slice does not fit into one.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _fill_sizes((data, fsdp, tensor), len(devices))
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(
    devices: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> AbstractMesh:
    """The mesh of so many devices, which need not be there; see `make_mesh`."""
    return AbstractMesh(_fill_sizes((data, fsdp, tensor), devices), AXES)


def _told(sizes: Sequence[int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes))


def _fill_sizes(sizes: tuple[int, ...], available: int) -> tuple[int, ...]:
    """The sizes with a number in place of -1."""
    asked = _told(sizes)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"mesh {asked} is not valid: every axis is at least 1, "
            "and at most one may be -1 (what is left)"
        )
    known = math.prod(size for size in sizes if size != -1)
    if available % known or (-1 not in sizes and known != available):
        raise UserError(
            f"mesh {asked} does not fit {available} device(s): the sizes must "
            f"multiply to {available}; change config.mesh"
        )
    return tuple(available // known if size == -1 else size for size in sizes)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices that are near each other, in groups.

    TPUs tell their slice, and so do GPUs where JAX knows it; else those of one process
    are together, if there are several. CPUs are all in one group.
    """
    if devices[0].platform == "cpu":
        return [list(devices)]
    key = lambda device: getattr(device, "slice_index", None)
    if None in map(key, devices):
        per_process = collections.Counter(d.process_index for d in devices)
        if devices[0].platform == "tpu" or min(per_process.values()) == 1:
            return [list(devices)]
        key = lambda device: device.process_index
    ordered = sorted(devices, key=key)
    return [list(group) for _, group in itertools.groupby(ordered, key)]


def _arrange(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array [data, fsdp, tensor], the near ones beside each other."""
    slices = _slices(devices)
    data, fsdp, tensor = sizes
    count, each = len(slices), len(slices[0])
    lay_out = functools.partial(
        mesh_utils.create_device_mesh, allow_split_physical_axes=True
    )
    if count == 1:
        return lay_out(sizes, devices)
    if any(len(group) != each for group in slices):
        found = ", ".join(str(len(group)) for group in slices)
        raise UserError(
            f"the {count} slices or hosts have {found} devices: a mesh needs the same "
            "number on each, so start the run on equal ones"
        )
    if data % count == 0:
        inner = data // count, fsdp, tensor
        return np.concatenate([lay_out(inner, group) for group in slices])
    if devices[0].platform != "tpu" and each % tensor == 0:
        ordered = [device for group in slices for device in group]
        return np.array(ordered, object).reshape(sizes)
    inside = "tensor" if devices[0].platform != "tpu" else "fsdp and tensor"
    raise UserError(
        f"mesh {_told(sizes)} does not fit {count} slices or hosts of {each} devices: "
        f"{inside} must stay inside one, so take data a multiple of {count} and fsdp x "
        f"tensor a divisor of {each}; change config.mesh"
    )


def path_string(path: tuple) -> str:
    """`policy/layers/mlp/up/kernel` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def logical_axes(path: str) -> tuple[str | None, ...]:
    """The logical axis of each dimension of the parameter at `path`.

    Raises:
      ValueError: no row of `RULES` matches the end of the path, or several do.
    """
    hits = [axes for rule, axes in RULES if re.search(rf"(^|/){rule}$", path)]
    if len(hits) != 1:
        raise ValueError(
            f"parameter {path!r} matches {len(hits)} rows of sharding.RULES, "
            "it must match exactly one"
        )
    return hits[0]


def _partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The mesh axis of each dimension; one that does not divide stays whole."""
    axes = logical_axes(path)
    if len(axes) != len(shape):
        raise ValueError(f"parameter {path!r} has shape {shape}, expected {axes}")
    names = (MESH_AXES[axis] for axis in axes)
    return P(
        *(n if n and d % mesh.shape[n] == 0 else None for n, d in zip(names, shape))
    )


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each leaf of `params` (arrays or `ShapeDtypeStruct`s)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, _partition(path_string(path), leaf.shape, mesh)
        ),
        params,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh
) -> Any:
    """Shardings of the optimizer's state: moments lie as their parameters do.

    `jax.jit(optimizer.init)` alone would replicate the moments.
    """
    state = jax.eval_shape(optimizer.init, params)
    # `optax.multi_transform` leaves a hole where another optimizer has the parameters.
    hole = lambda leaf: isinstance(leaf, optax.MaskedNode)
    return optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if hole(leaf) else sharding,
        state,
        param_shardings(params, mesh),
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=hole,
    )


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`with_sharding_constraint` under a mesh set by `jax.set_mesh`, else `x`.

    As for parameters, a dimension that its axis does not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def ways(axis):
        names = axis if isinstance(axis, tuple) else (axis,)
        return math.prod(mesh.shape[name] for name in names)

    kept = (a if a and d % ways(a) == 0 else None for a, d in zip(axes, x.shape))
    return jax.lax.with_sharding_constraint(x, P(*kept))


def gather_vocabulary(table: jax.Array) -> jax.Array:
    """A table [V, D] as it is used: whole but for `tensor`, which cuts V.

    To be called on a table in compute dtype, which has half the bytes to move.
    """
    # Cut as it lies first: else the cast would follow the gather.
    return constrain(constrain(table, "tensor", "fsdp"), "tensor", None)


def batch_shards() -> int:
    """Into how many pieces rows are cut under the mesh of `jax.set_mesh`; 1 without."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in BATCH)


def by_parts(function: Callable[[Any], Any], rows: Any, parts: int) -> Any:
    """What a function gives for equal parts of the rows, one after the other.

    Args:
      function: of part of the rows, [B / parts, ...], to arrays [B / parts, ...].
      rows: arrays [B, ...]; each device works on each part.
      parts: a divisor of B.

    Returns:
      Arrays [B, ...].
    """
    cut = lambda x: constrain(x.reshape(parts, -1, *x.shape[1:]), None, BATCH)
    found = jax.lax.map(function, jax.tree.map(cut, rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def to_devices(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host arrays, the same on every host, onto the mesh."""

    def put(x):
        host = np.asarray(x)
        return jax.make_array_from_callback(
            host.shape, sharding, lambda index: host[index]
        )

    return jax.tree.map(put, tree)


def to_host(tree: Any) -> Any:
    """Fetches arrays as NumPy; on many hosts every one gets all rows."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """Raises a `UserError` unless `size` rows divide over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        raise UserError(
            f"{name}={size} does not divide over the {ways} rows of the mesh "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}); "
            f"take a multiple of {ways} or change config.mesh"
        )


class PlanRow(NamedTuple):
    """One line of the printed plan."""

    path: str
    shape: tuple[int, ...]
    spec: str
    bytes_per_device: int


def plan(params: Any, mesh: Mesh) -> list[PlanRow]:
    """The plan for `params` as rows to print: what lies where, and how large."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_string(path)
        sharding = NamedSharding(mesh, _partition(name, leaf.shape, mesh))
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        wanted = [MESH_AXES[axis] for axis in logical_axes(name)]
        words = [
            _axis_words(dim, want, got, mesh)
            for dim, want, got in zip(leaf.shape, wanted, sharding.spec)
        ]
        found.append(PlanRow(name, leaf.shape, ", ".join(words), size))
    return found


def _axis_words(dim: int, wanted: str | None, got: str | None, mesh: Mesh) -> str:
    if wanted and not got and mesh.shape[wanted] > 1:
        return f"whole ({dim} % {wanted}={mesh.shape[wanted]})"
    return got if got and mesh.shape[got] > 1 else "-"

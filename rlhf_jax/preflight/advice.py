"""Whether a run fits, and the smallest change with which it does."""

import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from rlhf_jax import sharding
from rlhf_jax.preflight.needs import (
    ONLINE,
    batch_of,
    estimate,
    phase_rows,
    ways_of,
)

# Of a device, by what is advised: a plan may be some percent too low.
ADVISED_FILL = 0.9


def capacity(mesh: Any) -> int | None:
    """Bytes that each local device has; of a CPU its part of the memory that is free.

    None where neither is told.
    """
    devices = mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    limits = [found["bytes_limit"] for found in stats if "bytes_limit" in found]
    if limits:
        return min(limits)
    try:
        told = pathlib.Path("/proc/meminfo").read_text("ascii")
        own = pathlib.Path("/proc/self/statm").read_text("ascii").split()[1]
    except OSError:
        return None
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", told)[1])
    # What this process holds already is in the estimate.
    return (free + int(own) * os.sysconf("SC_PAGE_SIZE")) // len(devices)


def advise(
    config: ConfigDict, mesh: Any, available: int, platform: str | None = None
) -> str | None:
    """A sentence for a run that needs more than is available, None for one that fits.

    It names the smallest change after which the run fits with a tenth to spare, found
    by trying: one setting or axis of the mesh, else two.
    """
    needed = estimate(config, mesh, platform).total
    if needed <= available:
        return None
    gib = lambda size: f"{size / 2**30:.2f} GiB"
    told = (
        f"about {gib(needed)} are needed on each device, but it has {gib(available)}: "
    )
    single = list(_changes(config, mesh))
    pairs = [
        one | other
        for one, other in itertools.combinations(single, 2)
        if not {_place(k) for k in one} & {_place(k) for k in other}
    ]
    smallest = needed
    for change in (*single, *pairs):
        changed, other_mesh = _apply_change(config, mesh, change)
        if not _divides(changed, other_mesh):
            continue
        left = estimate(changed, other_mesh, platform).total
        if left <= ADVISED_FILL * available:
            flags = " ".join(
                f"--config.{k}=" + ("''" if v == "" else str(v))
                for k, v in change.items()
            )
            return f"{told}give {flags}, with which it is {gib(left)}"
        smallest = min(smallest, left)
    return (
        f"{told}no one or two settings are enough with a tenth to spare "
        f"({gib(smallest)} at the least), so take more devices and a larger "
        "config.mesh.fsdp, a smaller model, or an adapter (config.lora.rank)"
    )


def _place(name: str) -> str:
    """Two changes of one setting are one too many, and so are two of the mesh."""
    return "mesh" if name.startswith("mesh.") else name


def _changes(config: ConfigDict, mesh: Any) -> Iterator[dict[str, Any]]:
    """Single changes, those first that cost least."""
    learned = batch_of(config, mesh)[2]
    for chunk in (64, 16):
        if learned and chunk < (config.logprob_chunk or learned):
            yield {"logprob_chunk": chunk}
    if not config.remat:
        yield {"remat": True}
    elif config.get("remat_keeps", ""):
        yield {"remat_keeps": ""}
    online = config.algorithm in ONLINE
    part = config.algorithm if online else "learning"
    doublings = [2**n for n in range(1, 11)]
    data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.AXES)
    for times in doublings:
        if data % times == 0:
            yield _resized(config, data // times, fsdp * times, tensor)
    for times in doublings:
        yield {f"{part}.accumulation": config[part].get("accumulation", 1) * times}
    for times in doublings:
        if data % times == 0:
            yield _resized(config, data // times, fsdp, tensor * times)
    if config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    for times in doublings:
        if online and config.rollout.prompts % times == 0:
            yield {"rollout.prompts": config.rollout.prompts // times}


def _resized(config: ConfigDict, data: int, fsdp: int, tensor: int) -> dict[str, int]:
    """The axes to give; one that stands for what is left does so afterwards too."""
    sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    old = {f"mesh.{axis}": size for axis, size in config.mesh.items()}
    return {k: v for k, v in sizes.items() if old[k] not in (-1, v)}


def _apply_change(
    config: ConfigDict, mesh: Any, change: Mapping[str, Any]
) -> tuple[ConfigDict, AbstractMesh]:
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.update_from_flattened_dict(dict(change))
    sizes = [mesh.shape[axis] for axis in sharding.AXES]
    for place, axis in enumerate(sharding.AXES):
        sizes[place] = change.get(f"mesh.{axis}", sizes[place])
    if any(name.startswith("mesh.") for name in change):
        left = [a for a in sharding.AXES if config.mesh[a] == -1]
        if left:
            place = sharding.AXES.index(left[0])
            others = math.prod(sizes) // sizes[place]
            sizes[place] = math.prod(mesh.shape.values()) // others
    return changed, AbstractMesh(tuple(sizes), sharding.AXES)


def _divides(config: ConfigDict, mesh: Any) -> bool:
    """Whether the rows divide over the mesh and the micro-batches."""
    if config.algorithm in ONLINE:
        learning, rows = config[config.algorithm], phase_rows(config)
        parts = learning.minibatches * learning.accumulation
        whole = config.rollout.prompts % ways_of(mesh) == 0
    else:
        rows, parts = config.learning.batch, config.learning.get("accumulation", 1)
        whole = True
    return whole and rows % parts == 0 and rows // parts % ways_of(mesh) == 0


def rows(
    config: ConfigDict, mesh: Any, available: int | None, platform: str | None = None
) -> tuple[list[tuple[str, str]], str | None]:
    """The estimate as lines of the printed plan, and the advice if it is too much.

    Args:
      config: the run's.
      mesh: its devices, or how many there are to be.
      available: bytes of each; None if that is not known.
      platform: of the devices, as in `estimate`.
    """
    found = estimate(config, mesh, platform)
    mb = lambda size: f"{size / 1e6:,.1f} MB"
    room = "" if available is None else f" of {mb(available)}"
    told = [("memory", f"{mb(found.total)} a device{room}, most in the {found.stage}")]
    for kinds in (found.resident, found.stages[found.stage]):
        told += [(f"  {kind}", mb(size)) for kind, size in kinds.items() if size]
    if available is None or found.total <= available:
        return told, None
    return told, advise(config, mesh, available, platform)

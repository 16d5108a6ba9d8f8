"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

    ΔW = (α/r) B A,   lora_A.weight [r, in], lora_B.weight [out, r]

A module is called as in the family's own checkpoints (weight_names.py). Where those
hold query, key and value in one module, so does PEFT. There ours become one update of
rank 3r: the A's side by side, the B's as blocks along a diagonal, their outputs in the
order of the fused weight; `rank_pattern` and `alpha_pattern` tell its rank and keep its
scale. A note in the header of the safetensors says which blocks there are. A fused
module without it, as PEFT trains one, is read as three that have the same A.

Dimension key: L layers, r rank.

References:
    https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.families import family_of
from rlhf_jax.models.layers import LINEARS
from rlhf_jax.models.model_files import Tensor
from rlhf_jax.models.peft_settings import (
    SETTINGS,
    module_settings,
    rank_and_scale,
    read_settings,
)
from rlhf_jax.models.tensor_reader import (
    FLOATS,
    leaves_by_path,
    target_shardings,
    tensor_shape,
)
from rlhf_jax.models.transformer import init
from rlhf_jax.models.weight_names import AS_IS, SIDE_BY_SIDE, Row

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE = "base_model.model.score.weight"
BLOCKS = "rlhf_jax.blocks"  # in the header: {"query": its rank, ...}
# These kernels lie [in, out] in a checkpoint; lora_B is [out, r] all the same.
IN_OUT = (AS_IS, SIDE_BY_SIDE)


class PeftAdapter(NamedTuple):
    """An adapter as it lies in a folder.

    Attributes:
        adapter: the tree of models/lora.py, float32; where a head was trained too,
            `score` beside `layers`, in place of the model's own.
        rank: r, of modules that have none of their own.
        alpha: α; the model's `lora_scale` has to be α/r.
        dropout: the rate of dropout in training.
        targets: the linear layers that it is on.
        base_model: what it was trained on, a folder or a hub id; "" if not told.
    """

    adapter: Any
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    base_model: str


def save_adapter(
    folder: str | Path,
    adapter: Any,
    config: TransformerConfig,
    hf_config: Mapping[str, Any],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    base_model: str,
) -> None:
    """Write an adapter so that PEFT and `load_adapter` read it, in float32.

    Other files of the folder stay. adapter_config.json is taken away first and put back
    last, so that a crash leaves a folder which says that it is no adapter.

    Args:
        folder: created if need be.
        adapter: the tree of models/lora.py; with `score` beside `layers` it becomes the
            adapter of a sequence classifier.
        config: the model's shape.
        hf_config: the model's config.json.
        rank: r; linear layers may have another.
        alpha: α; α/r is the scale that the adapter was trained with.
        dropout: the rate of dropout in training.
        targets: the linear layers that it is on.
        base_model: where PEFT finds the model, a folder or a hub id.

    Raises:
        UserError: the folder cannot be written, or the head has a bias.
        ValueError: the adapter is on other linear layers than `targets`.
    """
    folder = Path(folder)
    linears = {name for part in adapter["layers"].values() for name in part}
    if linears != set(targets):
        raise ValueError(f"the adapter is on {linears}, its targets are {targets}")
    if "bias" in adapter.get("score", {}):
        raise UserError(
            f"The adapter cannot be written to {folder}: its head has a bias, and a "
            "sequence classifier of transformers has no room for one."
        )
    host = sharding.to_host(adapter)
    if jax.process_index() == 0:
        rows = _module_rows(hf_config, config)
        tensors, ranks, blocks = _tensors(rows, host, config)
        settings = module_settings(ranks, rows, rank=rank, alpha=alpha) | {
            "fan_in_fan_out": any(rows[name].transform in IN_OUT for name in ranks),
            "task_type": "SEQ_CLS" if "score" in host else "CAUSAL_LM",
            "modules_to_save": ["score"] if "score" in host else None,
            "base_model_name_or_path": base_model,
            "lora_dropout": dropout,
        }
        _write(folder, settings, tensors, {"format": "pt", BLOCKS: json.dumps(blocks)})
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_adapter")


def load_adapter(
    folder: str | Path,
    config: TransformerConfig,
    hf_config: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
) -> PeftAdapter:
    """Read an adapter that `save_adapter` or PEFT wrote.

    Layers that have none, or one of lower rank, are filled up with zeros, which stay
    zero in training. Where the scale of a module is not α/r, its B makes up for it.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: the shape of the model that it is for.
        hf_config: the config.json of that model.
        mesh: where to put it, by the table of sharding.py; None: the first device.

    Raises:
        UserError: no such adapter, a broken one, one for another model, or one that is
            more than low-rank updates of linear layers and a score head.
    """
    folder = Path(folder).expanduser()
    settings = read_settings(folder / SETTINGS)
    path = folder / WEIGHTS
    tensors, blocks = _open(path)
    rank, scale = rank_and_scale(settings)
    abstract = leaves_by_path(
        jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    )
    adapter: dict = {"layers": {}}
    for row, names in _modules_found(tensors, hf_config, config):
        shape = tensor_shape(row, config, abstract)
        shape = shape[::-1] if row.transform in IN_OUT else shape
        updates = {
            layer: _read_update(path, tensors, name, settings, shape)
            for layer, name in names.items()
        }
        for place, leaf in _leaves(row, updates, config, abstract, blocks).items():
            part, name = _linear(place)
            adapter["layers"].setdefault(part, {})[name] = leaf
    if "score" in (settings.get("modules_to_save") or ()):
        adapter["score"] = {"kernel": _read(path, tensors, SCORE, config.d_model, 1).T}
    if tensors:
        raise UserError(
            f"{path} holds {next(iter(tensors))!r}, for which this model has no place: "
            "read are low-rank updates of its layers' linear modules, and score.weight "
            "where adapter_config.json names it in modules_to_save."
        )
    # A copy, so that no two leaves share their memory.
    put = lambda x, to: jax.make_array_from_callback(x.shape, to, lambda i: x[i].copy())
    linears = {name for part in adapter["layers"].values() for name in part}
    return PeftAdapter(
        jax.tree.map(put, adapter, target_shardings(adapter, mesh)),
        rank,
        scale * rank,
        settings.get("lora_dropout") or 0.0,
        tuple(name for name in LINEARS if name in linears),
        settings.get("base_model_name_or_path") or "",
    )


def _module_rows(hf_config, config) -> dict[str, Row]:
    """The row of each kind of linear module by its name, "{}" for the layer."""
    family = family_of(hf_config)
    return {
        (family.prefix + row.name).removesuffix(".weight"): row
        for row in family.rows(config)
        if re.fullmatch(r"layers/\w+/\w+/kernel", row.paths[0])
    }


def _linear(path) -> tuple[str, str]:
    """("attention", "query") for layers/attention/query/kernel."""
    _, part, name, _ = path.split("/")
    return part, name


def _leaf(adapter, path):
    """The adapter's part beside a kernel, None if there is none."""
    part, name = _linear(path)
    return adapter["layers"].get(part, {}).get(name)


def _tensors(rows, adapter, config):
    """(all tensors, the rank of each module, the blocks of the fused one)."""
    tensors, ranks, blocks = {}, {}, {}
    for name, row in rows.items():
        parts = [_leaf(adapter, path) for path in row.paths]
        if any(parts):
            tensors |= _module_tensors(name, row, parts, config)
            widths = {
                _linear(path)[1]: part["lora_b"].shape[1]
                for path, part in zip(row.paths, parts)
                if part
            }
            ranks[name] = sum(widths.values())
            blocks |= widths if len(parts) > 1 else {}
    if "score" in adapter:
        kernel = adapter["score"]["kernel"]
        tensors[SCORE] = np.ascontiguousarray(kernel.T, np.float32)
    return tensors, ranks, blocks


def _module_tensors(name, row, parts, config) -> dict[str, np.ndarray]:
    """lora_A and lora_B of one kind of module in every layer."""
    present = [part for part in parts if part]
    A = np.concatenate([part["lora_a"] for part in present], axis=-1)
    L, _, R = A.shape
    out, at, wide = present[0]["lora_b"].shape[-1], 0, []
    for part in parts:
        block = np.zeros((L, R, out), np.float32)
        if part:
            r = part["lora_b"].shape[1]
            block[:, at : at + r] = part["lora_b"]
            at += r
        wide.append(block)
    tensors = {}
    for layer in range(L):
        B = row.transform.join(tuple(block[layer] for block in wide), config)
        B = B.T if row.transform in IN_OUT else B
        for half, value in [("A", A[layer].T), ("B", B)]:
            key = f"{PREFIX}{name.format(layer)}.lora_{half}.weight"
            # safetensors writes the memory behind an array as it lies.
            tensors[key] = np.ascontiguousarray(value, np.float32)
    return tensors


def _write(folder, settings, tensors, header):
    """Put both files into the folder, adapter_config.json last."""
    work = folder / ".writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise UserError(f"Cannot write an adapter to {folder}: {error}.") from error
    save_file(tensors, work / WEIGHTS, metadata=header)
    (work / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (folder / SETTINGS).unlink(missing_ok=True)
    for name in (WEIGHTS, SETTINGS):
        os.replace(work / name, folder / name)
    work.rmdir()


def _open(path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(every tensor by its name, the note on fused modules); nothing is read yet."""
    if not path.exists():
        raise UserError(
            f"{path} is missing; if the adapter is a pickle (*.bin), which can run "
            "code and is never opened, save it again with PEFT's save_pretrained."
        )
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt: {error}.") from error
    tensors = {
        name: Tensor(file, name, tuple(s.get_shape()), s.get_dtype())
        for name in file.keys()  # noqa: SIM118  (it is not a mapping)
        for s in [file.get_slice(name)]
    }
    if not tensors:
        raise UserError(f"{path} holds no tensors.")
    return tensors, json.loads((file.metadata() or {}).get(BLOCKS, "{}"))


def _modules_found(tensors, hf_config, config) -> Iterator[tuple[Row, dict[int, str]]]:
    """Each row that the adapter is on, and its modules' names by layer."""
    trunk = family_of(hf_config).prefix
    bare = not any(name.startswith(PREFIX + trunk) for name in tensors)
    for name, row in _module_rows(hf_config, config).items():
        name = name.removeprefix(trunk) if bare else name
        names = {layer: name.format(layer) for layer in range(config.num_layers)}
        names = {
            layer: name
            for layer, name in names.items()
            if any(f"{PREFIX}{name}.lora_{half}.weight" in tensors for half in "AB")
        }
        if names:
            yield row, names


def _read(path, tensors, name, size, axis) -> np.ndarray:
    """Take a matrix out of `tensors`, float32; its `axis` must have this size."""
    if name not in tensors:
        raise UserError(f"{path} lacks {name}.")
    tensor = tensors.pop(name)
    if tensor.dtype not in FLOATS:
        raise UserError(f"{name} in {path} is stored as {tensor.dtype}: not a float.")
    if len(tensor.shape) != 2 or tensor.shape[axis] != size:
        raise UserError(
            f"{name} in {path} has shape {tensor.shape}, but this model means {size} "
            f"on axis {axis}: the adapter is of another model."
        )
    return np.asarray(tensor.file.get_tensor(name), np.float32)


def _read_update(path, tensors, module, settings, shape):
    """(A [r, in], B [out, r]) of one module, at the adapter's common scale."""
    out, width = shape
    A = _read(path, tensors, f"{PREFIX}{module}.lora_A.weight", width, 1)
    B = _read(path, tensors, f"{PREFIX}{module}.lora_B.weight", out, 0)
    rank, scale = rank_and_scale(settings, module)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise UserError(
            f"{module} in {path} has the ranks {A.shape[0]} (A) and {B.shape[1]} (B); "
            f"{SETTINGS} says {rank}."
        )
    return A, np.float32(scale / rank_and_scale(settings)[1]) * B


def _leaves(row, updates, config, abstract, blocks):
    """{kernel's path: {lora_a [L, in, r], lora_b [L, r, out]}} for one row."""
    R = max(len(A) for A, _ in updates.values())
    L, width, _ = abstract[row.paths[0]].shape
    a = np.zeros((L, width, R), np.float32)
    bs = [np.zeros((L, R, abstract[path].shape[2]), np.float32) for path in row.paths]
    for layer, (A, B) in updates.items():
        a[layer, :, : len(A)] = A.T
        B = B.T if row.transform in IN_OUT else B
        for b, part in zip(bs, row.transform.split(B, config)):
            b[layer, : len(A)] = part
    ranks = {path: blocks.get(_linear(path)[1]) for path in row.paths}
    ends = np.cumsum([0, *(rank or 0 for rank in ranks.values())])
    if len(ranks) == 1 or ends[-1] != R:
        return {path: {"lora_a": a, "lora_b": b} for path, b in zip(row.paths, bs)}
    return {
        path: {"lora_a": a[:, :, i:j], "lora_b": b[:, i:j]}
        for path, b, i, j in zip(row.paths, bs, ends, ends[1:])
        if ranks[path]
    }

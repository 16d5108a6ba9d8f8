"""Reading and writing Hugging Face model directories: config.json and safetensors.

Weights stream: each leaf of ours is assembled on its own, straight into its target
sharding, and fetched from there on its own, so that a model never lies in host memory
twice.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors.numpy import save_file

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.families import Family, config_from_hf, family_of
from rlhf_jax.models.model_files import (
    INDEX,
    SINGLE,
    find_model,
    open_tensors,
    read_config,
)
from rlhf_jax.models.transformer import init, init_head
from rlhf_jax.models.weight_names import AS_IS, TRANSPOSED, Row

FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry: causal masks and rotary frequencies.
BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


class Pretrained(NamedTuple):
    """A model as it lies in a directory.

    Attributes:
        config: its shape.
        hf_config: the parsed config.json, kept for writing it back.
        params: the tree of models/transformer.py, float32.
    """

    config: TransformerConfig
    hf_config: dict[str, Any]
    params: Any


def load_pretrained(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    head: bool | None = False,
    key: jax.Array | None = None,
) -> Pretrained:
    """Read a model from a directory or from the Hugging Face hub.

    Args:
        source: a directory with config.json and safetensors, or a hub id.
        mesh: where to put the parameters; None puts them on the first device.
        head: True wants a scalar head (score.weight), False an unembedding, None
            whichever the checkpoint has.
        key: a typed PRNG key; with `head`, a checkpoint without score.weight is given
            a fresh head from it instead of being refused.

    Returns:
        The model, its parameters float32 whatever the file holds.

    Raises:
        UserError: no such model, an unsupported or broken one, or one whose tensors
            are not those its config.json promises.
    """
    directory = find_model(source)
    hf_config = read_config(directory)
    config = config_from_hf(hf_config)
    family = family_of(hf_config)
    tensors = open_tensors(directory)
    has_head = "score.weight" in tensors
    head = has_head if head is None else head
    if head and not has_head and key is None:
        raise UserError(
            f"{source} has no scalar head (score.weight): it is a language model, not "
            "a reward, cost or value model."
        )
    if not head and has_head:
        raise UserError(
            f"{source} is a model with a scalar head (score.weight), not a language "
            "model."
        )
    abstract = jax.eval_shape(
        functools.partial(init, config, head=head), jax.random.key(0)
    )
    if mesh is None:
        here = SingleDeviceSharding(jax.devices()[0])
        targets = jax.tree.map(lambda _: here, abstract)
    else:
        targets = sharding.param_shardings(abstract, mesh)
    fresh_head = head and not has_head
    if fresh_head:
        del abstract["score"]
    rows = _rows(family, config, head=has_head, names=tensors)
    _check_tensors(directory, rows, tensors, config, abstract)
    readers = _readers(rows, tensors, config)

    def place(path, leaf, target):
        read = functools.partial(_read_leaf, readers[sharding.path_string(path)], leaf)
        return jax.make_array_from_callback(leaf.shape, target, read)

    score_target = targets.pop("score") if fresh_head else None
    params = jax.tree_util.tree_map_with_path(place, abstract, targets)
    if fresh_head:
        params["score"] = jax.device_put(init_head(config, key), score_target)
    return Pretrained(config, hf_config, params)


def save_pretrained(
    directory: str | Path,
    pretrained: Pretrained,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model so that `transformers` and `load_pretrained` read it.

    Other files of the directory (a tokenizer's) stay; an earlier model in it is
    replaced. config.json is taken away first and put back last, so that a crash leaves
    a directory which says that it is no model, never one with half of its weights.

    Args:
        directory: created if need be.
        pretrained: what to write; with `score` in its params it becomes a
            ...ForSequenceClassification with one label.
        dtype: "float32", "bfloat16" or "float16".
        max_shard_bytes: weights beyond this are spread over several files.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = Path(directory)
    if jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            work = directory / ".writing"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        except OSError as error:
            raise UserError(f"Cannot write a model to {directory}: {error}.") from error
    else:
        work = None
    files = _write_tensors(work, pretrained, jnp.dtype(dtype), max_shard_bytes)
    if work is not None:
        config = _mended_config(pretrained, dtype)
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (directory / "config.json").unlink(missing_ok=True)
        for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
            old.unlink(missing_ok=True)
        for name in [*files, "config.json"]:
            os.replace(work / name, directory / name)
        work.rmdir()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")


def _mended_config(pretrained, dtype):
    """config.json as it was, telling what is written now."""
    hf_config = dict(pretrained.hf_config)
    family = family_of(hf_config)
    for stale in ("torch_dtype", "num_labels", "id2label", "label2id"):
        hf_config.pop(stale, None)
    hf_config["dtype"] = str(jnp.dtype(dtype))
    if "score" in pretrained.params:
        hf_config["architectures"] = [family.classifier]
        # transformers counts the labels by this table.
        hf_config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    else:
        hf_config["architectures"] = [family.language_model]
    return hf_config


def _write_tensors(work, pretrained, dtype, max_shard_bytes):
    """Write all weights into `work` (None on the hosts that only help to gather).

    Returns:
        The names of the files written.
    """
    config, params = pretrained.config, pretrained.params
    family = family_of(pretrained.hf_config)
    rows = _rows(family, config, head="score" in params)
    leaves = _leaves(params)
    names = [(row, name) for row in rows for name in _names(row, config)]
    sizes = {
        row.name: dtype.itemsize * int(np.prod(_shape(row, config, leaves)))
        for row in rows
    }
    shards, room = [[]], max_shard_bytes
    for row, name in names:
        if shards[-1] and sizes[row.name] > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= sizes[row.name]
    values = _values(rows, config, leaves, dtype)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        tensors = {name: next(values) for name in shard}
        places |= dict.fromkeys(shard, file)
        if work is not None:
            save_file(tensors, work / file, metadata={"format": "pt"})
        del tensors
    files = list(dict.fromkeys(places.values()))
    if len(shards) > 1 and work is not None:
        total = sum(sizes[row.name] for row, _ in names)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        files.append(INDEX)
    return files


def _values(rows, config, leaves, dtype) -> Iterator[np.ndarray]:
    """Checkpoint tensors in the order of `rows`, one leaf on the host at a time."""
    for row in rows:
        parts = [np.asarray(sharding.to_host(leaves[path])) for path in row.paths]
        layers = range(config.num_layers) if "{}" in row.name else [...]
        for layer in layers:
            tensor = row.transform.join(tuple(part[layer] for part in parts), config)
            # safetensors writes the memory behind an array as it lies.
            yield np.ascontiguousarray(tensor, dtype)


def _rows(family: Family, config, *, head: bool, names=None) -> list[Row]:
    """All rows of a checkpoint, with full names.

    Args:
        family: whose names.
        config: the model's shape.
        head: whether there is a scalar head instead of an unembedding.
        names: the names present in a checkpoint being read; None gives the names to
            write.
    """
    prefix = family.prefix
    if names is not None and not any(name.startswith(prefix) for name in names):
        prefix = ""
    rows = [row._replace(name=prefix + row.name) for row in family.rows(config)]
    if head:
        return [*rows, Row("score.weight", ("score/kernel",), TRANSPOSED)]
    if config.tied_embeddings:
        return rows
    found = [name for name in family.unembed if names is not None and name in names]
    name = (found or family.unembed)[0]
    return [*rows, Row(name, ("unembed/kernel",), AS_IS)]


def _names(row: Row, config) -> list[str]:
    """The tensors of a row: one, or one a layer."""
    if "{}" not in row.name:
        return [row.name]
    return [row.name.format(layer) for layer in range(config.num_layers)]


def _leaves(params) -> dict[str, Any]:
    """Leaves by path."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return {sharding.path_string(path): leaf for path, leaf in found}


def _shape(row: Row, config, leaves) -> tuple[int, ...]:
    """The shape of each tensor of a row, from our leaves' shapes."""
    layered = "{}" in row.name
    shapes = [leaves[path].shape[1 if layered else 0 :] for path in row.paths]
    parts = tuple(np.broadcast_to(np.float32(0), shape) for shape in shapes)
    return row.transform.join(parts, config).shape


def _check_tensors(directory, rows, tensors, config, abstract):
    """Refuse missing, unexpected, misshapen and non-float tensors."""
    leaves = _leaves(abstract)
    rows = [row for row in rows if all(path in leaves for path in row.paths)]
    expected = {
        name: shape
        for row in rows
        for shape in [_shape(row, config, leaves)]
        for name in _names(row, config)
    }
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(f"{directory} lacks {_few(missing)}.")
    heads = {"lm_head.weight", "embed_out.weight"}
    unexpected = [
        name
        for name in tensors
        if name not in expected and name not in heads and not BUFFERS.search(name)
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
        return lambda: row.transform.split(tensor.file.get_tensor(name), config)[part]

    return {
        path: ("{}" in row.name, [reader(row, n, part) for n in _names(row, config)])
        for row in rows
        for part, path in enumerate(row.paths)
        if all(name in tensors for name in _names(row, config))
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

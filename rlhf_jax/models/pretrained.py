"""Reading and writing Hugging Face model directories: config.json and safetensors.

Weights stream, in (tensor_reader.py) and out: each leaf of ours is fetched from its
sharding on its own, so that a model never lies in host memory twice.
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
from jax.sharding import Mesh
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
from rlhf_jax.models.score_heads import (
    SAFE_RLHF,
    Head,
    abstract_head,
    find_head,
    fold_normalizer,
    head_rows,
    head_to_write,
)
from rlhf_jax.models.tensor_reader import (
    leaves_by_path,
    read_params,
    target_shardings,
    tensor_names,
    tensor_shape,
)
from rlhf_jax.models.transformer import init, init_head
from rlhf_jax.models.weight_names import AS_IS, Row

# Not read where they are found: causal masks and rotary frequencies of old checkpoints,
# an unembedding that is tied or beside a head, what safe-rlhf keeps of its scores.
SPARE = re.compile(
    r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$"
    r"|^(lm_head|embed_out)\.weight$|^normalizer\.(mean|var|count)$"
)


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
    num_labels: int | None = 1,
) -> Pretrained:
    """Read a model from a directory or from the Hugging Face hub.

    Args:
        source: a directory with config.json and safetensors, or a hub id.
        mesh: where to put the parameters; None puts them on the first device.
        head: True wants a head that scores a sequence (score_heads.py), False an
            unembedding, None whichever the checkpoint has.
        key: a typed PRNG key; with `head`, a checkpoint without a head is given a
            fresh scalar one from it instead of being refused.
        num_labels: how many scores the head must give; None takes any number.

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
    found = find_head(tensors)
    head = found is not None if head is None else head
    _check_head(source, found, head, num_labels, fresh=key is not None)
    abstract = jax.eval_shape(
        functools.partial(init, config, head=head), jax.random.key(0)
    )
    if found:
        abstract["score"] = abstract_head(found, config.d_model)
    targets = target_shardings(abstract, mesh)
    fresh_head = head and not found
    if fresh_head:
        del abstract["score"]
    score_target = targets.pop("score") if fresh_head else None
    rows = _rows(family, config, found, names=tensors)
    params = read_params(
        directory, rows, tensors, config, abstract, targets=targets, spare=SPARE
    )
    if found and found.name == SAFE_RLHF:
        params["score"] = fold_normalizer(params["score"], hf_config, tensors)
    if fresh_head:
        params["score"] = jax.device_put(init_head(config, key), score_target)
    return Pretrained(config, hf_config, params)


def _check_head(source, found, wanted, num_labels, *, fresh):
    """Refuse a checkpoint whose head is not what the caller can use."""
    if wanted and not found and not fresh:
        raise UserError(
            f"{source} has no scalar head (score.weight): it is a language model, not "
            "a reward, cost or value model."
        )
    if not wanted and found:
        raise UserError(
            f"{source} is a model with a scalar head ({found.name}.weight), not a "
            "language model."
        )
    if found and num_labels not in (None, found.num_labels):
        raise UserError(
            f"{source} is a classifier with {found.num_labels} labels; expected a "
            f"reward, cost or value model, with {num_labels}."
        )


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
            ...ForSequenceClassification, or with a bias in it a ...ForScore, which
            safe-rlhf reads.
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
    family, head = family_of(hf_config), head_to_write(pretrained.params)
    stale = ["torch_dtype", "num_labels", "do_normalize", "mean", "var"]
    if head is None or head.num_labels == 1:
        stale += ["id2label", "label2id"]
    for name in stale:
        hf_config.pop(name, None)
    hf_config["dtype"] = str(jnp.dtype(dtype))
    if head is None:
        hf_config["architectures"] = [family.language_model]
        return hf_config
    hf_config["architectures"] = [family.classifier]
    if head.name == SAFE_RLHF:
        name = family.classifier.replace("ForSequenceClassification", "ForScore")
        scores = {"score_dim": head.num_labels, "score_bias": True, "bias": True}
        return hf_config | scores | {"architectures": [name]}
    if head.num_labels == 1:
        # transformers counts the labels by this table.
        hf_config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf_config


def _write_tensors(work, pretrained, dtype, max_shard_bytes):
    """Write all weights into `work` (None on the hosts that only help to gather).

    Returns:
        The names of the files written.
    """
    config, params = pretrained.config, pretrained.params
    family = family_of(pretrained.hf_config)
    rows = _rows(family, config, head_to_write(params))
    leaves = leaves_by_path(params)
    names = [(row, name) for row in rows for name in tensor_names(row, config)]
    sizes = {
        row.name: dtype.itemsize * int(np.prod(tensor_shape(row, config, leaves)))
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


def _rows(family: Family, config, head: Head | None, *, names=None) -> list[Row]:
    """All rows of a checkpoint, with full names.

    Args:
        family: whose names.
        config: the model's shape.
        head: what stands in place of an unembedding.
        names: the names present in a checkpoint being read; None gives the names to
            write.
    """
    prefix = family.prefix
    if names is not None and not any(name.startswith(prefix) for name in names):
        prefix = ""
    rows = [row._replace(name=prefix + row.name) for row in family.rows(config)]
    if head:
        return [*rows, *head_rows(head)]
    if config.tied_embeddings:
        return rows
    found = [name for name in family.unembed if names is not None and name in names]
    name = (found or family.unembed)[0]
    return [*rows, Row(name, ("unembed/kernel",), AS_IS)]

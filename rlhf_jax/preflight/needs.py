"""How much memory a run needs on each device, before its programs are compiled.

An estimate is a function of the config and the mesh alone: shapes are traced, nothing
is loaded, compiled or run. What lives all through the run (weights, reference, critic,
reward models, optimizer) is counted leaf by leaf as `sharding` lays it out. On top of
that comes the stage that needs most, sampling or the update. What the update keeps for
the backward pass is what JAX's own derivative keeps, of the share of the model that one
device computes: a config with that part of the heads, the width and the vocabulary, on
that part of the rows. No other pass of PPO and GRPO is over more rows at a time.

Dimension key: B rows on one device, T tokens of a row, P of them prompt, N response,
L layers, D model width, F feed-forward width, H heads, V vocabulary.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from ml_collections import ConfigDict

from rlhf_jax import loading, run_files, sharding, trainable
from rlhf_jax.models import lora
from rlhf_jax.models.attention import Context, fused_kind
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.families import FAMILIES, config_from_hf
from rlhf_jax.models.model_files import (
    find_model,
    is_hub_id,
    open_tensors,
    read_config,
)
from rlhf_jax.models.transformer import Model, make_model
from rlhf_jax.trees import join, split

ONLINE = ("ppo", "grpo")
PAIRED = ("dpo", "reward_model", "cost_model")
SCORED = ("reward_model", "cost_model")


class Estimate(NamedTuple):
    """Bytes on one device, by kind.

    Attributes:
      resident: what lives all through the run.
      stages: what each stage needs beside that, while it lasts.
    """

    resident: Mapping[str, int]
    stages: Mapping[str, Mapping[str, int]]

    @property
    def stage(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda name: sum(self.stages[name].values()))

    @property
    def total(self) -> int:
        """The peak."""
        largest = self.stages[self.stage].values()
        return sum(self.resident.values()) + sum(largest)


def estimate(config: ConfigDict, mesh: Any, platform: str | None = None) -> Estimate:
    """What a run of this config needs on each device of this mesh.

    Args:
      config: of PPO, GRPO, DPO, SFT or a reward or cost model.
      mesh: a `Mesh` or an `AbstractMesh` with the axes of `sharding`.
      platform: "cpu", "gpu" or "tpu", which decides on fused attention; None for that
        of the devices here.
    """
    platform = platform or jax.default_backend()
    shape = model_shape(config.model, config)
    held = _held(config, shape, mesh)
    stages = {"update": _update(config, shape, held, mesh, platform)}
    if "rollout" in config:
        stages["rollout"] = _rollout(config, shape, held["weights"], mesh)
    resident = {k: v for k, v in held.items() if k != "trained" and v}
    return Estimate(resident, stages)


def model_shape(source: Any, config: ConfigDict) -> TransformerConfig:
    """The shape of `config.model` or of a critic's source; reads config.json alone."""
    if isinstance(source, str):
        place = loading.BUILTIN.get(source) or run_files.exported(source)
        source = read_config(find_model(place, weights=False))
    else:
        source = source.to_dict()
    noise = {name: config.get(name, 0.0) for name in ("dropout", "neftune_alpha")}
    return dataclasses.replace(config_from_hf(source), **noise)


def _held(config: ConfigDict, shape: TransformerConfig, mesh: Any) -> dict[str, int]:
    """What lives all through the run, and "trained": the weights that are."""
    params = _params(shape, head=config.algorithm in SCORED)
    if config.lora.rank:
        rank, targets = config.lora.rank, tuple(config.lora.targets)
        adapter = jax.eval_shape(
            lambda: lora.init_adapter(
                params, jax.random.key(0), rank=rank, targets=targets
            )
        )
        chosen = lambda path: lora.is_adapter(path) or path[0].key == "score"
        trained, frozen = split(join(params, adapter), chosen)
    else:
        trained, frozen = trainable.cut(config, params, mesh)
    learns, kept = _laid_out(trained, mesh), _laid_out(frozen or {}, mesh)
    compared = config.algorithm in ONLINE or (
        config.algorithm == "dpo" and (config.evaluate_kl or config.lora.rank)
    )
    if config.lora.rank and not config.lora.get("start", ""):
        compared = False  # the frozen model is the reference
    critic = 0
    if config.algorithm == "ppo":
        critic = _laid_out(_critic(config, shape), mesh)
    entries = [*config.get("rewards", {}).values(), *config.get("judges", {}).values()]
    entries += [config.safety] if "safety" in config else []
    sources = [entry["source"] for entry in entries if entry["source"]]
    return {
        "weights": learns + kept,
        "reference": learns if compared else 0,
        "critic": critic,
        "reward models": sum(_reward_bytes(source, mesh) for source in sources),
        "optimizer moments": 2 * (learns + critic),
        "trained": learns + critic,
    }


def _params(shape: TransformerConfig, *, head: bool = False) -> Any:
    """The weights as shapes."""
    model = make_model(shape)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), head=head))


def _laid_out(params: Any, mesh: Any) -> int:
    return sum(row.bytes_per_device for row in sharding.plan(params, mesh))


def _critic(config: ConfigDict, shape: TransformerConfig) -> Any:
    if config.critic.shared:
        return {"score": _params(shape, head=True)["score"]}
    return _params(_critic_shape(config, shape), head=True)


def _critic_shape(config: ConfigDict, shape: TransformerConfig) -> TransformerConfig:
    source = config.critic.source
    return shape if source == "policy" else model_shape(source, config)


def _reward_bytes(source: Any, mesh: Any) -> int:
    """The weights of a reward model, or of several; functions have none."""
    if not isinstance(source, str):
        return sum(_reward_bytes(one, mesh) for one in source)
    place = loading.BUILTIN.get(source) or run_files.exported(source)
    if not pathlib.Path(place).expanduser().is_dir() and not is_hub_id(place):
        return 0
    settings = read_config(find_model(place, weights=False))
    if settings.get("model_type") in FAMILIES:
        return _laid_out(_params(config_from_hf(settings), head=True), mesh)
    # A classifier, in float32 on each device.
    tensors = open_tensors(find_model(place)).values()
    return sum(4 * math.prod(tensor.shape) for tensor in tensors)


# The share of one device.


def ways_of(mesh: Any) -> int:
    """Over how many devices rows are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _share(shape: TransformerConfig, mesh: Any) -> TransformerConfig:
    """The model that one device computes: `tensor` cuts what it divides."""
    ways = mesh.shape["tensor"]
    cut = lambda size: size // ways if size % ways == 0 else size
    changes = {"vocab_size": cut(shape.vocab_size), "d_ff": cut(shape.d_ff)}
    if shape.num_kv_heads % ways == 0:
        changes["num_heads"] = cut(shape.num_heads)
        changes["num_kv_heads"] = cut(shape.num_kv_heads)
    return dataclasses.replace(shape, **changes)


def batch_of(config: ConfigDict, mesh: Any) -> tuple[int, int, int]:
    """(rows of a micro-batch on one device, tokens of each, of which are learned)."""
    if config.algorithm in ONLINE:
        learning, rollout = config[config.algorithm], config.rollout
        rows = phase_rows(config) // (learning.minibatches * learning.accumulation)
        length = rollout.prompt_tokens + rollout.max_new_tokens
        return -(-rows // ways_of(mesh)), length, rollout.max_new_tokens
    rows = config.learning.batch // config.learning.get("accumulation", 1)
    rows *= 2 if config.algorithm in PAIRED else 1
    length = config.sequence_tokens
    learned = 0 if config.algorithm in SCORED else length - 1
    return -(-rows // ways_of(mesh)), length, learned


def phase_rows(config: ConfigDict) -> int:
    """Responses of a phase of PPO or GRPO."""
    return config.rollout.prompts * config.rollout.get("group", 1)


def _logits(config: ConfigDict, shape: TransformerConfig, rows: int, tokens: int):
    """Logits, their gradient and what stands between: four times [B, T, V] float32."""
    chunk = config.get("logprob_chunk", 0)
    return 4 * 4 * rows * min(chunk or tokens, tokens) * shape.vocab_size


# What a backward pass keeps.


def _kept(function: Any, *arguments: Any, but: Any = lambda shape: False) -> int:
    """Bytes that the derivative of a function keeps beside the function's arguments.

    Arrays of which `but(shape)` is true are left out.
    """
    residuals = lambda *x: jax.tree.leaves(jax.vjp(function, *x)[1])
    traced = jax.make_jaxpr(residuals)(*arguments).jaxpr
    known = set(traced.invars) | set(traced.constvars)
    made = {v for v in traced.outvars if isinstance(v, Var)} - known
    return sum(
        math.prod(v.aval.shape) * v.aval.dtype.itemsize
        for v in made
        if not but(v.aval.shape)
    )


@functools.lru_cache(maxsize=256)
def _kept_of_row(
    shape: TransformerConfig,
    dtype: str,
    remat: str | None,
    tokens: int,
    platform: str,
) -> float:
    """Bytes that a row of a forward pass leaves for the backward pass.

    `remat` is what is not recomputed, or None if nothing is recomputed. Where attention
    is fused on the platform, its scores [..., H, T, T] are not kept.
    """
    fused = _is_fused(shape, dtype, tokens, platform)
    is_scores = lambda of: fused and len(of) > 4 and of[-2:] == (tokens, tokens)
    how = {"remat": remat is not None, "remat_keeps": remat or ""}
    model, rows = make_model(shape, dtype=dtype, **how), 8
    params = _params(shape)
    ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    return _kept(lambda p: _apply(model, p, ids), params, but=is_scores) / rows


def _is_fused(shape: TransformerConfig, dtype: str, tokens: int, platform: str) -> bool:
    """Whether attention is fused; False where queries have the shape of scores."""
    if tokens == shape.head_dim:
        return False
    # As many rows and heads as the mesh of `jax.set_mesh` divides.
    heads = shape.num_heads * jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    query = jax.ShapeDtypeStruct(
        (sharding.batch_shards(), tokens, heads, shape.head_dim), jnp.dtype(dtype)
    )
    masked = Context(None, None, allowed=query, segments=query)
    kind = fused_kind(query, masked, shape.attention_softcap, platform)
    return kind is not None


def _remat(config: ConfigDict) -> str | None:
    return config.get("remat_keeps", "") if config.remat else None


def _apply(model: Model, params: Any, ids: jax.ShapeDtypeStruct) -> jax.Array:
    zeros = jnp.zeros(ids.shape, ids.dtype)
    return model.apply(params, zeros, zeros + 1)


def _layer_of_row(
    shape: TransformerConfig, dtype: str, tokens: int, platform: str
) -> float:
    """The same of one layer alone that is not recomputed."""
    one, two = (
        _kept_of_row(
            dataclasses.replace(shape, num_layers=count), dtype, None, tokens, platform
        )
        for count in (1, 2)
    )
    return two - one


# Stages.


def _update(
    config: ConfigDict, shape: TransformerConfig, held: dict, mesh: Any, platform: str
) -> dict[str, int]:
    """Gradients and activations of a micro-batch.

    The layers' backward pass takes the memory of the logits once they are gone. With
    remat it needs what one layer keeps, else about 0.7 of that, for what was kept is
    freed meanwhile. A critic's backward pass does not wait for the policy's.
    """
    rows, tokens, learned = batch_of(config, mesh)

    def passes(share: TransformerConfig) -> tuple[float, float]:
        """What a forward pass keeps, and what a layer's backward pass needs."""
        kept = _kept_of_row(share, config.dtype, _remat(config), tokens, platform)
        layer = _layer_of_row(share, config.dtype, tokens, platform)
        return rows * kept, rows * layer * (1.0 if config.remat else 0.7)

    share = _share(shape, mesh)
    kept, layer = passes(share)
    of_critic = 0.0
    if config.algorithm == "ppo" and not config.critic.shared:
        critic = _share(_critic_shape(config, shape), mesh)
        of_critic = sum(passes(critic)) + _gathered(config, critic, mesh)[1]
    logits = _logits(config, share, rows, learned)
    learning = config.get(config.algorithm, config.get("learning"))
    accumulates = learning.get("accumulation", 1) > 1 or (
        "learning" in config and config.learning.get("accumulation", 1) > 1
    )
    table, layers = _gathered(config, share, mesh)
    at_logits = logits > 0 and logits + table > layer + layers
    name = "logits" if at_logits else "one layer's backward pass"
    return {
        "gradients": (2 if accumulates else 1) * held["trained"],
        "activations kept": int(kept),
        "critic's backward pass": int(of_critic),
        name: int(logits if at_logits else layer),
        "gathered weights": table if at_logits else layers,
    }


def _gathered(
    config: ConfigDict, share: TransformerConfig, mesh: Any
) -> tuple[int, int]:
    """What `fsdp` brings together for the logits, and for one layer's backward pass.

    For the logits the table and its gradient, for a layer its weights, the next one's
    and its gradient; weights in compute dtype, gradients in float32.
    """
    if mesh.shape["fsdp"] == 1:
        return 0, 0
    layers = jax.tree.leaves(_params(share)["layers"])
    layer = sum(x.size for x in layers) // share.num_layers
    table, size = share.d_model * share.vocab_size, _itemsize(config)
    return table * (size + 4), layer * (2 * size + 4)


def _itemsize(config: ConfigDict) -> int:
    return jnp.dtype(config.dtype).itemsize


def _rollout(
    config: ConfigDict, shape: TransformerConfig, weights: int, mesh: Any
) -> dict[str, int]:
    """Weights laid out for decoding, the cache of prompts and slots, and logits."""
    rollout, share = config.rollout, _share(shape, mesh)
    asked = -(-rollout.get("prompts", 1) // ways_of(mesh))
    rows = asked * rollout.get("group", 1)
    slots = min(-(-rollout.get("slots", 0) // ways_of(mesh)) or rows, rows)
    P, N = rollout.prompt_tokens, rollout.max_new_tokens
    dtype = jnp.dtype(rollout.get("cache_dtype", "") or config.dtype)
    head = shape.head_dim * dtype.itemsize + (4 if dtype == jnp.int8 else 0)
    token = 2 * shape.num_layers * share.num_kv_heads * head
    return {
        "weights for decoding": weights * _itemsize(config) // 4,
        "KV cache": token * (slots * (P + N) + asked * P),
        "logits": 4 * 4 * slots * share.vocab_size,
    }

"""Low-rank adaptation: a small trained update beside each frozen linear layer.

    y = x W + (α/r) (x A) B,   A [in, r] random, B [r, out] zero at first

An adapter is a tree of its own with the leaves `lora_a` and `lora_b`, stacked over the
layers as the weights are. Joined to the weights (`trees.join`) it is applied inside
each linear layer; without it they are the base model, bit for bit, which is why a
reference policy needs no copy.

Dimension key: L layers, r rank.

References:
    Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.layers import LINEARS, dot

LEAVES = ("lora_a", "lora_b")


def init_adapter(
    params: Any, key: jax.Array, *, rank: int, targets: Sequence[str]
) -> Any:
    """A fresh adapter, which changes nothing yet.

    A is uniform in ±1/√in (He et al. 2015 with a = √5, as PEFT starts it), B is zero.

    Args:
        params: the model's, with stacked layers.
        key: a typed PRNG key; a layer's A does not depend on the other targets.
        rank: r, at least 1.
        targets: names among `layers.LINEARS`.

    Returns:
        {"layers": {"attention": {"query": {"lora_a": [L, in, r], ...}}}}, float32.

    Raises:
        UserError: an unknown target, or one that the model does not have.
    """
    if rank < 1:
        raise UserError(f"lora.rank={rank} must be at least 1")
    known = set(params["layers"]["attention"]) | set(params["layers"]["mlp"])
    for name in targets:
        if name not in LINEARS or name not in known:
            raise UserError(
                f"lora.targets names {name!r}, which this model does not have; take "
                "some of " + ", ".join(linear for linear in LINEARS if linear in known)
            )
    adapter = {}
    for part in ("attention", "mlp"):
        for name, layer in params["layers"][part].items():
            if name in targets:
                L, width, out = layer["kernel"].shape
                spread = 1 / math.sqrt(width)
                drawn = jax.random.fold_in(key, LINEARS.index(name))
                a = jax.random.uniform(drawn, (L, width, rank), minval=-1.0)
                leaf = {"lora_a": spread * a, "lora_b": jnp.zeros((L, rank, out))}
                adapter.setdefault(part, {})[name] = leaf
    return {"layers": adapter}


def merge(params: Any, adapter: Any, *, scale: float) -> Any:
    """The weights with the adapter added: W + (α/r) A B, in the dtype of W.

    Args:
        params: the model's, with stacked layers.
        adapter: from `init_adapter`, trained.
        scale: α/r.
    """
    layers = dict(params["layers"])
    for part, linears in adapter["layers"].items():
        layers[part] = dict(layers[part])
        for name, leaf in linears.items():
            old = layers[part][name]
            update = jax.vmap(dot)(leaf["lora_a"], leaf["lora_b"])
            kernel = (old["kernel"] + scale * update).astype(old["kernel"].dtype)
            layers[part][name] = old | {"kernel": kernel}
    return params | {"layers": layers}


def is_adapter(path: tuple) -> bool:
    """Whether a leaf at this tree path belongs to an adapter."""
    return path[-1].key in LEAVES

"""Tensor names: the rows that tie a family's checkpoint tensors to our leaves.

Dimensions: H query heads, h head width.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from rlhf_jax.models.config import TransformerConfig


class Transform(NamedTuple):
    """How one checkpoint tensor becomes leaves of ours, and back.

    Attributes:
        split: (tensor, config) -> one array per path of the row.
        join: (arrays, config) -> tensor; the inverse of `split`.
    """

    split: Callable[[np.ndarray, TransformerConfig], tuple[np.ndarray, ...]]
    join: Callable[[tuple[np.ndarray, ...], TransformerConfig], np.ndarray]


class Row(NamedTuple):
    """One kind of checkpoint tensor.

    Attributes:
        name: its name; "{}" stands for the layer's number.
        paths: the leaves it holds, as "layers/attention/query/kernel".
        transform: how the two are turned into each other.
    """

    name: str
    paths: tuple[str, ...]
    transform: Transform


AS_IS = Transform(lambda x, c: (x,), lambda xs, c: xs[0])
# torch.nn.Linear keeps [out, in].
TRANSPOSED = Transform(lambda x, c: (x.T,), lambda xs, c: xs[0].T)
# GPT-2's c_attn: query, key and value side by side on the last axis.
SIDE_BY_SIDE = Transform(
    lambda x, c: tuple(np.split(x, 3, axis=-1)), lambda xs, c: np.concatenate(xs, -1)
)


def _split_by_head(x, c):
    """GPT-NeoX's query_key_value: [H, 3, h, ...] flattened."""
    heads = x.reshape(c.num_heads, 3, c.head_dim, *x.shape[1:])
    return tuple(heads[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))


def _join_by_head(xs, c):
    heads = [x.T.reshape(c.num_heads, c.head_dim, *x.T.shape[1:]) for x in xs]
    return np.stack(heads, axis=1).reshape(-1, *heads[0].shape[2:])


BY_HEAD = Transform(_split_by_head, _join_by_head)


def _linear(name, path, bias, transform=TRANSPOSED) -> Iterator[Row]:
    yield Row(f"{name}.weight", (f"{path}/kernel",), transform)
    if bias:
        yield Row(f"{name}.bias", (f"{path}/bias",), AS_IS)


def _layer_norm(name, path) -> Iterator[Row]:
    yield Row(f"{name}.weight", (f"{path}/scale",), AS_IS)
    yield Row(f"{name}.bias", (f"{path}/bias",), AS_IS)


def _fused(name, transform, bias) -> Iterator[Row]:
    """One tensor that holds query, key and value."""
    for ours, theirs in [("kernel", "weight"), ("bias", "bias")][: 1 + bias]:
        parts = ("query", "key", "value")
        paths = tuple(f"layers/attention/{part}/{ours}" for part in parts)
        yield Row(f"{name}.{theirs}", paths, transform)


def llama_rows(c: TransformerConfig) -> list[Row]:
    """Rows of the trunk of every family built like Llama."""
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }
    if c.post_norms:
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "post_mlp_norm",
        }
    if c.qk_norm:
        norms["self_attn.q_norm"] = "attention/query_norm"
        norms["self_attn.k_norm"] = "attention/key_norm"
    rows = [Row("embed_tokens.weight", ("embed/tokens",), AS_IS)]
    for theirs, ours in norms.items():
        rows.append(
            Row(f"layers.{{}}.{theirs}.weight", (f"layers/{ours}/scale",), AS_IS)
        )
    for theirs, ours in [("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")]:
        bias = c.attention_out_bias if ours == "out" else c.qkv_bias
        name, path = f"layers.{{}}.self_attn.{theirs}_proj", f"layers/attention/{ours}"
        rows.extend(_linear(name, path, bias))
    for part in ("gate", "up", "down"):
        name, path = f"layers.{{}}.mlp.{part}_proj", f"layers/mlp/{part}"
        rows.extend(_linear(name, path, c.mlp_bias))
    return [*rows, Row("norm.weight", ("final_norm/scale",), AS_IS)]


def gpt2_rows(c: TransformerConfig) -> list[Row]:
    """Rows of GPT-2's trunk."""
    # GPT-2's Conv1D keeps [in, out], as we do.
    return [
        Row("wte.weight", ("embed/tokens",), AS_IS),
        Row("wpe.weight", ("embed/positions",), AS_IS),
        *_layer_norm("h.{}.ln_1", "layers/attention_norm"),
        *_fused("h.{}.attn.c_attn", SIDE_BY_SIDE, True),
        *_linear("h.{}.attn.c_proj", "layers/attention/out", True, AS_IS),
        *_layer_norm("h.{}.ln_2", "layers/mlp_norm"),
        *_linear("h.{}.mlp.c_fc", "layers/mlp/up", True, AS_IS),
        *_linear("h.{}.mlp.c_proj", "layers/mlp/down", True, AS_IS),
        *_layer_norm("ln_f", "final_norm"),
    ]


def gpt_neox_rows(c: TransformerConfig) -> list[Row]:
    """Rows of GPT-NeoX's trunk."""
    bias = c.qkv_bias
    return [
        Row("embed_in.weight", ("embed/tokens",), AS_IS),
        *_layer_norm("layers.{}.input_layernorm", "layers/attention_norm"),
        *_fused("layers.{}.attention.query_key_value", BY_HEAD, bias),
        *_linear("layers.{}.attention.dense", "layers/attention/out", bias),
        *_layer_norm("layers.{}.post_attention_layernorm", "layers/mlp_norm"),
        *_linear("layers.{}.mlp.dense_h_to_4h", "layers/mlp/up", True),
        *_linear("layers.{}.mlp.dense_4h_to_h", "layers/mlp/down", True),
        *_layer_norm("final_layer_norm", "final_norm"),
    ]

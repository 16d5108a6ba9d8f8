"""Model families: how a Hugging Face config and its tensor names map onto ours.

A family is a function from its config.json to a TransformerConfig and a list of rows
(weight_names.py), one for each kind of tensor in its checkpoints. Defaults for absent
settings are those of the family's class in transformers.

Dimensions: L layers, D model width, H query heads, K key-value heads, h head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import RopeScaling, TransformerConfig
from rlhf_jax.models.weight_names import Row, gpt2_rows, gpt_neox_rows, llama_rows

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


class Family(NamedTuple):
    """What is special about one `model_type`.

    Attributes:
        configure: config.json as a dict -> TransformerConfig.
        rows: TransformerConfig -> rows of the trunk, names without `prefix`.
        prefix: what stands before the trunk's names; checkpoints of the bare trunk
            lack it.
        unembed: names under which the unembedding may be found; the first is written.
        language_model: architecture with an unembedding.
        classifier: architecture with `score.weight`.
    """

    configure: Callable[[dict[str, Any]], TransformerConfig]
    rows: Callable[[TransformerConfig], list[Row]]
    prefix: str
    unembed: tuple[str, ...]
    language_model: str
    classifier: str


def family_of(hf_config: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: its `model_type` is not one of the supported ones.
    """
    kind = hf_config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"Unsupported architecture: model_type {kind!r} "
            f"(architectures {hf_config.get('architectures')}); "
            f"supported are {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def config_from_hf(hf_config: dict[str, Any]) -> TransformerConfig:
    """The shape of the model that a Hugging Face config.json describes.

    Args:
        hf_config: the parsed config.json, in the spelling of transformers 4 or 5.

    Raises:
        UserError: an unsupported architecture, or a setting inside a supported one
            that would change its results and is not implemented.
    """
    family = family_of(hf_config)
    if hf_config.get("quantization_config"):
        raise UserError(
            "The checkpoint is quantised (quantization_config in config.json); "
            "give one with float32, float16 or bfloat16 weights."
        )
    try:
        return family.configure(hf_config)
    except KeyError as error:
        raise UserError(
            f"config.json of a {hf_config['model_type']} model lacks {error}."
        ) from error


def _activation(name):
    if name not in ACTIVATIONS:
        raise UserError(
            f"Unsupported activation {name!r}; supported are {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def _reject(c, **harmless):
    """Refuse settings that change the computation; give the value that does not."""
    for name, value in harmless.items():
        if c.get(name, value) not in (value, None):
            raise UserError(
                f"Unsupported setting in the config of a {c['model_type']} model: "
                f"{name}={c[name]!r}; only {value!r} is supported."
            )


def _rope(c, layer_type, theta):
    """(theta, scaling, rotated fraction) of one kind of layer, old spelling or new."""
    parameters = c.get("rope_parameters") or {}
    parameters = parameters.get(layer_type) or parameters
    scaling = c.get("rope_scaling") or {}
    merged = {**parameters, **({} if layer_type == "sliding_attention" else scaling)}
    fraction = merged.get("partial_rotary_factor")
    kind = merged.get("rope_type", merged.get("type", "default")) or "default"
    theta = merged.get("rope_theta") or theta
    if kind == "default":
        return theta, None, fraction
    if kind == "linear":
        return theta, RopeScaling("linear", merged["factor"]), fraction
    if kind == "llama3":
        original = merged.get("original_max_position_embeddings")
        scaling = RopeScaling(
            "llama3",
            merged["factor"],
            merged["low_freq_factor"],
            merged["high_freq_factor"],
            original or c["max_position_embeddings"],
        )
        return theta, scaling, fraction
    raise UserError(
        f"Unsupported rope type {kind!r}; supported are default, linear, llama3."
    )


def _sliding_layers(c, L, default):
    """layer_types as booleans; `default(i)` says whether layer i slides without it."""
    if c.get("layer_types") is None:
        return tuple(bool(default(i)) for i in range(L))
    known = {"sliding_attention": True, "full_attention": False}
    unknown = set(c["layer_types"]) - set(known)
    if unknown:
        raise UserError(
            f"Unsupported layer_types {sorted(unknown)}; supported are {list(known)}."
        )
    return tuple(known[kind] for kind in c["layer_types"])


def _llama_like(c, *, activation="silu", tied=False, theta=10_000.0, **settings):
    """What the families built like Llama share."""
    theta, scaling, fraction = _rope(c, "full_attention", c.get("rope_theta") or theta)
    if fraction not in (None, 1.0):
        raise UserError(
            f"Unsupported partial_rotary_factor {fraction} in a {c['model_type']} "
            "model."
        )
    D, H = c["hidden_size"], c["num_attention_heads"]
    shared = {
        "vocab_size": c["vocab_size"],
        "d_model": D,
        "num_layers": c["num_hidden_layers"],
        "num_heads": H,
        "num_kv_heads": c.get("num_key_value_heads") or H,
        "head_dim": c.get("head_dim") or D // H,
        "d_ff": c["intermediate_size"],
        "max_positions": c.get("max_position_embeddings", 2048),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": c.get("rms_norm_eps", 1e-6),
        "activation": _activation(c.get("hidden_act") or activation),
        "tied_embeddings": c.get("tie_word_embeddings", tied),
        "init_std": c.get("initializer_range", 0.02),
    }
    return TransformerConfig(**{**shared, **settings})


def _llama(c):
    bias = c.get("attention_bias", False)
    return _llama_like(
        c, qkv_bias=bias, attention_out_bias=bias, mlp_bias=c.get("mlp_bias", False)
    )


def _mistral(c):
    return _llama_like(
        c,
        num_kv_heads=c.get("num_key_value_heads", 8) or c["num_attention_heads"],
        max_positions=c.get("max_position_embeddings", 4096 * 32),
        sliding_window=c.get("sliding_window", 4096),
    )


def _qwen(c, **settings):
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    first = c.get("max_window_layers", 28)
    slides = _sliding_layers(
        c, c["num_hidden_layers"], lambda i: window is not None and i >= first
    )
    return _llama_like(
        c,
        num_kv_heads=c.get("num_key_value_heads", 32) or c["num_attention_heads"],
        max_positions=c.get("max_position_embeddings", 32768),
        sliding_window=window,
        sliding_layers=slides,
        **settings,
    )


def _qwen2(c):
    return _qwen(c, qkv_bias=True)


def _qwen3(c):
    bias = c.get("attention_bias", False)
    return _qwen(
        c,
        head_dim=c.get("head_dim") or 128,
        qk_norm=True,
        qkv_bias=bias,
        attention_out_bias=bias,
    )


def _gemma(c, activation=None, **settings):
    _reject(c, use_bidirectional_attention=False)
    # Early configs say "gelu" and mean the tanh form; transformers reads them so too.
    act = activation or c.get("hidden_act")
    act = "gelu_pytorch_tanh" if act in (None, "gelu") else act
    bias = c.get("attention_bias", False)
    return _llama_like(
        {**c, "hidden_act": act},
        tied=True,
        head_dim=c.get("head_dim") or 256,
        max_positions=c.get("max_position_embeddings", 8192),
        norm_unit_offset=True,
        embedding_scale=float(c["hidden_size"]) ** 0.5,
        qkv_bias=bias,
        attention_out_bias=bias,
        **settings,
    )


def _gemma2(c, **settings):
    L = c["num_hidden_layers"]
    defaults = {
        "attention_softcap": c.get("attn_logit_softcapping", 50.0),
        "logit_softcap": c.get("final_logit_softcapping", 30.0),
        "sliding_layers": _sliding_layers(c, L, lambda i: (i + 1) % 2),
    }
    return _gemma(
        c,
        activation=c.get("hidden_activation", "gelu_pytorch_tanh"),
        num_kv_heads=c.get("num_key_value_heads", 4) or c["num_attention_heads"],
        query_scale=float(c.get("query_pre_attn_scalar", 256)) ** -0.5,
        post_norms=True,
        sliding_window=c.get("sliding_window", 4096),
        **{**defaults, **settings},
    )


def _gemma3(c):
    pattern = c.get("sliding_window_pattern", 6)
    local = c.get("rope_local_base_freq", 10_000.0)
    local, local_scaling, _ = _rope(c, "sliding_attention", local)
    if local_scaling is not None:
        raise UserError("Unsupported: rope scaling on Gemma 3's sliding layers.")
    return _gemma2(
        {"rope_theta": 1_000_000.0, "max_position_embeddings": 131_072, **c},
        attention_softcap=c.get("attn_logit_softcapping"),
        logit_softcap=c.get("final_logit_softcapping"),
        sliding_layers=_sliding_layers(
            c, c["num_hidden_layers"], lambda i: (i + 1) % pattern
        ),
        rope_local_theta=local,
        qk_norm=True,
    )


def _gpt2(c):
    _reject(c, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    D, H = c["n_embd"], c["n_head"]
    return TransformerConfig(
        vocab_size=c["vocab_size"],
        d_model=D,
        num_layers=c["n_layer"],
        num_heads=H,
        num_kv_heads=H,
        head_dim=D // H,
        d_ff=c.get("n_inner") or 4 * D,
        max_positions=c.get("n_positions", 1024),
        positions="learned",
        norm="layer",
        norm_eps=c.get("layer_norm_epsilon", 1e-5),
        activation=_activation(c.get("activation_function", "gelu_new")),
        gated_mlp=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_embeddings=c.get("tie_word_embeddings", True),
        query_scale=None if c.get("scale_attn_weights", True) else 1.0,
        init_std=c.get("initializer_range", 0.02),
    )


def _gpt_neox(c):
    theta = c.get("rotary_emb_base") or c.get("rope_theta") or 10_000.0
    theta, scaling, fraction = _rope(c, "full_attention", theta)
    D, H = c["hidden_size"], c["num_attention_heads"]
    bias = c.get("attention_bias", True)
    return TransformerConfig(
        vocab_size=c["vocab_size"],
        d_model=D,
        num_layers=c["num_hidden_layers"],
        num_heads=H,
        num_kv_heads=H,
        head_dim=D // H,
        d_ff=c["intermediate_size"],
        max_positions=c.get("max_position_embeddings", 2048),
        rope_theta=theta,
        rope_fraction=c.get("rotary_pct", 0.25) if fraction is None else fraction,
        rope_scaling=scaling,
        norm="layer",
        norm_eps=c.get("layer_norm_eps", 1e-5),
        parallel_residual=c.get("use_parallel_residual", True),
        activation=_activation(c.get("hidden_act", "gelu")),
        gated_mlp=False,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=True,
        tied_embeddings=c.get("tie_word_embeddings", False),
        init_std=c.get("initializer_range", 0.02),
    )


def _like_llama(configure, name, classifier=None):
    return Family(
        configure,
        llama_rows,
        "model.",
        ("lm_head.weight",),
        f"{name}ForCausalLM",
        f"{classifier or name}ForSequenceClassification",
    )


FAMILIES = {
    "gpt2": Family(
        _gpt2,
        gpt2_rows,
        "transformer.",
        ("lm_head.weight",),
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
    ),
    "gpt_neox": Family(
        _gpt_neox,
        gpt_neox_rows,
        "gpt_neox.",
        ("embed_out.weight", "lm_head.weight"),
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
    ),
    "llama": _like_llama(_llama, "Llama"),
    "mistral": _like_llama(_mistral, "Mistral"),
    "qwen2": _like_llama(_qwen2, "Qwen2"),
    "qwen3": _like_llama(_qwen3, "Qwen3"),
    "gemma": _like_llama(_gemma, "Gemma"),
    "gemma2": _like_llama(_gemma2, "Gemma2"),
    "gemma3_text": _like_llama(_gemma3, "Gemma3", "Gemma3Text"),
}

"""Reading ...ForSequenceClassification checkpoints of BERT, DistilBERT and RoBERTa.

As for the decoders (families.py), a family is a function from its config.json to our
configuration and a list of rows, one for each kind of tensor.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.encoder import EncoderConfig, init
from rlhf_jax.models.families import ACTIVATIONS
from rlhf_jax.models.model_files import Tensor, find_model, open_tensors, read_config
from rlhf_jax.models.tensor_reader import read_params, target_shardings
from rlhf_jax.models.weight_names import AS_IS, TRANSPOSED, Row

# Buffers, what is left of pretraining, and the pooler that RoBERTa's head does without.
SPARE = re.compile(
    r"\.position_ids$|^(cls|lm_head|qa_outputs|vocab_\w+)\.|^roberta\.pooler\."
)
# Settings that change the computation, each with the value that does not.
HARMLESS = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "quantization_config": None,
}


class EncoderFamily(NamedTuple):
    """What is special about one `model_type`.

    Attributes:
        configure: config.json as a dict, labels -> EncoderConfig.
        names: the name of a tensor (without .weight or .bias) -> the path of our leaves
            (without kernel, scale or bias); "{}" stands for the layer's number.
        out: the tensor that only a sequence classifier has.
    """

    configure: Callable[[Mapping[str, Any], int], EncoderConfig]
    names: Mapping[str, str]
    out: str


class PretrainedEncoder(NamedTuple):
    """A classifier as it lies in a directory.

    Attributes:
        config: its shape.
        hf_config: the parsed config.json.
        params: the tree of encoder.py, float32.
    """

    config: EncoderConfig
    hf_config: dict[str, Any]
    params: Any


def load_encoder(source: str | Path, *, mesh: Mesh | None = None) -> PretrainedEncoder:
    """Read a classifier from a directory or from the Hugging Face hub.

    Args:
        source: a directory with config.json and safetensors, or a hub id.
        mesh: where to put the parameters; None puts them on the first device.

    Returns:
        The classifier, its parameters float32 whatever the file holds.

    Raises:
        UserError: no such model, an unsupported or broken one, or none that classifies
            texts.
    """
    directory = find_model(source)
    hf_config = read_config(directory)
    config = encoder_config(hf_config)
    family = ENCODERS[hf_config["model_type"]]
    tensors = _today(open_tensors(directory))
    if f"{family.out}.weight" not in tensors:
        raise UserError(
            f"{source} has no {family.out}.weight: it is no sequence classifier "
            f"(architectures {hf_config.get('architectures')})."
        )
    abstract = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    params = read_params(
        directory,
        encoder_rows(family, config),
        tensors,
        config,
        abstract,
        targets=target_shardings(abstract, mesh),
        spare=SPARE,
    )
    return PretrainedEncoder(config, hf_config, params)


def encoder_config(hf_config: Mapping[str, Any]) -> EncoderConfig:
    """The shape of the classifier that a Hugging Face config.json describes.

    Raises:
        UserError: an unsupported architecture, or a setting inside a supported one that
            would change its results and is not implemented.
    """
    kind = hf_config.get("model_type")
    if kind not in ENCODERS:
        raise UserError(
            f"Unsupported encoder: model_type {kind!r}; "
            f"supported are {', '.join(ENCODERS)}."
        )
    for name, value in HARMLESS.items():
        if hf_config.get(name) not in (value, None):
            raise UserError(
                f"Unsupported setting in the config of a {kind} model: "
                f"{name}={hf_config[name]!r}; only {value!r} is supported."
            )
    labels = hf_config.get("id2label")
    # transformers' default is two labels, which it then does not write
    n = len(labels) if labels else hf_config.get("num_labels", 2)
    try:
        return ENCODERS[kind].configure(hf_config, n)
    except KeyError as error:
        raise UserError(f"config.json of a {kind} model lacks {error}.") from error


def encoder_rows(family: EncoderFamily, config: EncoderConfig) -> list[Row]:
    """Every row of a checkpoint."""
    return [
        row
        for name, path in family.names.items()
        if path != "embed/types" or config.num_types
        for row in _rows(name, path)
    ]


def _rows(name, path):
    if path.startswith("embed/"):
        return [Row(f"{name}.weight", (path,), AS_IS)]
    weight, transform = ("scale", AS_IS) if "norm" in path else ("kernel", TRANSPOSED)
    return [
        Row(f"{name}.weight", (f"{path}/{weight}",), transform),
        Row(f"{name}.bias", (f"{path}/bias",), AS_IS),
    ]


def _today(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under today's names: TensorFlow called a norm's two gamma and beta."""
    renamed = {
        "LayerNorm.gamma": "LayerNorm.weight",
        "LayerNorm.beta": "LayerNorm.bias",
    }
    found = {}
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def _trunk(c, *, D, L, H, d_ff, activation, eps, positions):
    if activation not in ACTIVATIONS:
        raise UserError(
            f"Unsupported activation {activation!r}; "
            f"supported are {', '.join(ACTIVATIONS)}."
        )
    return TransformerConfig(
        vocab_size=c["vocab_size"],
        d_model=D,
        num_layers=L,
        num_heads=H,
        num_kv_heads=H,
        head_dim=D // H,
        d_ff=d_ff,
        max_positions=positions,
        positions="learned",
        norm="layer",
        norm_eps=eps,
        activation=ACTIVATIONS[activation],
        gated_mlp=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        init_std=c.get("initializer_range", 0.02),
    )


def _bert(c, n, *, offset=0):
    trunk = _trunk(
        c,
        D=c["hidden_size"],
        L=c["num_hidden_layers"],
        H=c["num_attention_heads"],
        d_ff=c["intermediate_size"],
        activation=c.get("hidden_act", "gelu"),
        eps=c.get("layer_norm_eps", 1e-12),
        positions=c.get("max_position_embeddings", 512) - offset,
    )
    return EncoderConfig(trunk, offset, c.get("type_vocab_size", 2), "tanh", n)


def _roberta(c, n):
    # Its positions are counted from the padding's own row of the table on.
    pad = c.get("pad_token_id")
    return _bert(c, n, offset=(1 if pad is None else pad) + 1)


def _distilbert(c, n):
    trunk = _trunk(
        c,
        D=c["dim"],
        L=c["n_layers"],
        H=c["n_heads"],
        d_ff=c["hidden_dim"],
        activation=c.get("activation", "gelu"),
        eps=1e-12,
        positions=c.get("max_position_embeddings", 512),
    )
    return EncoderConfig(trunk, 0, 0, "relu", n)


def _bert_names(prefix, head):
    layer = f"{prefix}.encoder.layer.{{}}"
    return {
        f"{prefix}.embeddings.word_embeddings": "embed/tokens",
        f"{prefix}.embeddings.position_embeddings": "embed/positions",
        f"{prefix}.embeddings.token_type_embeddings": "embed/types",
        f"{prefix}.embeddings.LayerNorm": "embed_norm",
        f"{layer}.attention.self.query": "layers/attention/query",
        f"{layer}.attention.self.key": "layers/attention/key",
        f"{layer}.attention.self.value": "layers/attention/value",
        f"{layer}.attention.output.dense": "layers/attention/out",
        f"{layer}.attention.output.LayerNorm": "layers/attention_norm",
        f"{layer}.intermediate.dense": "layers/mlp/up",
        f"{layer}.output.dense": "layers/mlp/down",
        f"{layer}.output.LayerNorm": "layers/mlp_norm",
        **head,
    }


BERT_NAMES = _bert_names(
    "bert",
    {"bert.pooler.dense": "classifier/dense", "classifier": "classifier/out"},
)
ROBERTA_NAMES = _bert_names(
    "roberta",
    {
        "classifier.dense": "classifier/dense",
        "classifier.out_proj": "classifier/out",
    },
)
DISTILBERT_NAMES = {
    "distilbert.embeddings.word_embeddings": "embed/tokens",
    "distilbert.embeddings.position_embeddings": "embed/positions",
    "distilbert.embeddings.LayerNorm": "embed_norm",
    "distilbert.transformer.layer.{}.attention.q_lin": "layers/attention/query",
    "distilbert.transformer.layer.{}.attention.k_lin": "layers/attention/key",
    "distilbert.transformer.layer.{}.attention.v_lin": "layers/attention/value",
    "distilbert.transformer.layer.{}.attention.out_lin": "layers/attention/out",
    "distilbert.transformer.layer.{}.sa_layer_norm": "layers/attention_norm",
    "distilbert.transformer.layer.{}.ffn.lin1": "layers/mlp/up",
    "distilbert.transformer.layer.{}.ffn.lin2": "layers/mlp/down",
    "distilbert.transformer.layer.{}.output_layer_norm": "layers/mlp_norm",
    "pre_classifier": "classifier/dense",
    "classifier": "classifier/out",
}
ROBERTA = EncoderFamily(_roberta, ROBERTA_NAMES, "classifier.out_proj")
ENCODERS = {
    "bert": EncoderFamily(_bert, BERT_NAMES, "classifier"),
    "distilbert": EncoderFamily(_distilbert, DISTILBERT_NAMES, "classifier"),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
}

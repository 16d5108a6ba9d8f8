"""Models and tokenizers for trainers: loaded or made, laid out, and written back."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import keys, progress, run_files, sharding
from rlhf_jax.data.dialogues import set_chat_template
from rlhf_jax.data.tokenizer import load_tokenizer, special_tokens, train_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.forward import KEPT
from rlhf_jax.models.pretrained import Pretrained, load_pretrained, save_pretrained
from rlhf_jax.models.transformer import Model, make_model

BUILTIN = {
    f"builtin:{name}": str(pathlib.Path(__file__).parent / "builtin" / name)
    for name in ("policy", "reward")
}
BUILTIN["builtin"] = BUILTIN["builtin:policy"]


DTYPES = ("float32", "bfloat16")


class Loaded(NamedTuple):
    """A model in memory: its functions, its weights on the mesh, how it is written."""

    model: Model
    params: Any
    hf_config: dict[str, Any]


def load_model(
    source: str | ConfigDict,
    config: ConfigDict,
    mesh: Mesh,
    *,
    head: bool | None = False,
) -> Loaded:
    """Loads a model by name, or makes a fresh one from a Hugging Face config.

    Args:
      source: "builtin", a directory, a hub id; or the config of a model to make.
      config: the run's; `seed`, `dtype`, `remat`, `remat_keeps`, `unroll`, `lora`
        and, if there, `dropout` and `neftune_alpha` are read.
      mesh: where the weights go.
      head: a scalar head in place of the unembedding, drawn from the seed where the
        checkpoint has none; None takes what the checkpoint has.
    """
    key = keys.branch_key(config.seed, keys.INIT, 0)
    if isinstance(source, str):
        found = load_pretrained(
            _find(source),
            mesh=mesh,
            head=head,
            key=key if head else None,
        )
        model = _bind(found.config, config)
        return Loaded(model, found.params, found.hf_config)
    hf_config = source.to_dict()
    model = _bind(config_from_hf(hf_config), config)

    def init(key):
        return model.init(key, head=bool(head))

    shardings = sharding.param_shardings(jax.eval_shape(init, key), mesh)
    return Loaded(model, jax.jit(init, out_shardings=shardings)(key), hf_config)


def _find(source: str) -> str:
    """A builtin's directory, that of a run's exported model, or the source itself."""
    return BUILTIN.get(source) or run_files.exported(source)


def _bind(shape: TransformerConfig, config: ConfigDict) -> Model:
    for name in ("dtype", "export_dtype"):
        if config[name] not in DTYPES:
            raise UserError(
                f"config.{name}={config[name]!r} is unknown; "
                f"take one of {', '.join(DTYPES)}"
            )
    settings = {name: config.get(name, 0.0) for name in ("dropout", "neftune_alpha")}
    if config.lora.rank:
        settings["lora_scale"] = config.lora.alpha / config.lora.rank
        settings["lora_dropout"] = config.lora.dropout
    shape = dataclasses.replace(shape, **settings)
    if config.remat_keeps not in KEPT:
        raise UserError(
            f"config.remat_keeps={config.remat_keeps!r} is unknown; take one of "
            f"{', '.join(map(repr, KEPT))}"
        )
    how = {name: config[name] for name in ("remat", "remat_keeps", "unroll")}
    return make_model(shape, dtype=config.dtype, **how)


def zero_head(params: Any, mesh: Mesh) -> Any:
    """The subtree of a scalar head that says 0 everywhere, as a critic starts."""
    width = params["final_norm"]["scale"].shape[-1]
    head = {"score": {"kernel": np.zeros((width, 1), np.float32)}}
    return jax.tree.map(sharding.to_devices, head, sharding.param_shardings(head, mesh))


def load_critic(
    config: ConfigDict, policy: Loaded, mesh: Mesh
) -> tuple[Model | None, Any]:
    """The critic of `config.critic`, saying 0 everywhere.

    Returns:
      A model and its weights, from the trunk of `config.critic.source`; or None and a
      head alone, if the critic shares the policy's trunk.
    """
    source = config.critic.source
    if config.critic.shared:
        if source != "policy":
            raise UserError(
                f"config.critic.source={source!r} needs config.critic.shared=False: a "
                "shared critic is a head on the policy's own trunk"
            )
        return None, zero_head(policy.params, mesh)
    loaded = load_model(
        config.model if source == "policy" else source, config, mesh, head=None
    )
    needs, has = policy.model.config, loaded.model.config
    if has.vocab_size < needs.vocab_size or has.max_positions < needs.max_positions:
        raise UserError(
            f"the critic {source!r} has {has.vocab_size} tokens and a context of "
            f"{has.max_positions}, the policy {needs.vocab_size} and "
            f"{needs.max_positions}: a critic reads what the policy writes"
        )
    trunk = {k: v for k, v in loaded.params.items() if k not in ("unembed", "score")}
    return loaded.model, trunk | zero_head(trunk, mesh)


def copy(params: Any) -> Any:
    """A copy with buffers of its own, so that donating one leaves the other whole."""
    return jax.tree.map(jnp.copy, params)


def init_optimizer(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh
) -> Any:
    """Fresh optimizer state, its moments laid out as the parameters are."""
    shardings = sharding.optimizer_shardings(optimizer, params, mesh)
    return jax.jit(optimizer.init, out_shardings=shardings)(params)


def load_run_tokenizer(
    config: ConfigDict, console: Console, texts: Sequence[str] = ()
) -> Any:
    """The tokenizer of `config.tokenizer`, or, where that is "", the one of the model.

    "train" trains one on `texts`, with the vocabulary size of `config.model`. The chat
    template of `config.data.chat_template`, a Jinja file, takes the place of its own.
    """
    if config.tokenizer == "train":
        return train_tokenizer(texts, config.model.vocab_size)
    source = config.tokenizer or config.model
    if not isinstance(source, str):
        raise UserError(
            'config.tokenizer="" means that of the model, and config.model is one to '
            'make: give a tokenizer, or "train"'
        )
    tokenizer = load_tokenizer(_find(source))
    if config.data.get("chat_template", ""):
        set_chat_template(tokenizer, config.data.chat_template)
    note = special_tokens(tokenizer).note
    if note:
        progress.say(console, note)
    return tokenizer


def export(
    config: ConfigDict,
    files: run_files.RunFiles,
    loaded: Loaded,
    params: Any,
    tokenizer: Any,
) -> None:
    """Writes the trained model and its tokenizer as transformers reads them."""
    found = Pretrained(loaded.model.config, loaded.hf_config, params)
    save_pretrained(files.export, found, dtype=config.export_dtype)
    if jax.process_index() == 0:
        tokenizer.save_pretrained(files.export)

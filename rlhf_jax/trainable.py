"""What of a model is trained: all of it, all that no pattern freezes, or an adapter.

A trainer's state holds the trained part alone, and so do its optimizer and its
checkpoints; the frozen part is an argument of its compiled functions.
"""

import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import keys, loading, run_files, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.peft_files import save_adapter
from rlhf_jax.trees import join, split, weight_name


class Parts(NamedTuple):
    """A model's weights in two trees; `trees.join` makes one of them again.

    Attributes:
      trained: what the optimizer moves.
      frozen: the rest, or None if there is none.
    """

    trained: Any
    frozen: Any | None


def cut(config: ConfigDict, params: Any, mesh: Mesh) -> Parts:
    """The parts that `config.lora` and `config.freeze` ask for.

    Args:
      config: the run's. With `lora.rank` an adapter, and a scalar head if there is one,
        are trained; else all whose path no pattern of `freeze` is found in.
      params: the weights of the model, on the mesh.
      mesh: where the adapter goes.

    Raises:
      UserError: a pattern that freezes nothing, or all; targets that are not there.
    """
    if config.lora.rank:
        if config.freeze:
            raise UserError(
                "config.freeze has no meaning with config.lora.rank: all but the "
                "adapter is frozen"
            )
        params = join(params, _new_adapter(config, params, mesh))
        chosen = lambda path: lora.is_adapter(path) or path[0].key == "score"
        return Parts(*split(params, chosen))
    if not config.freeze:
        return Parts(params, None)
    named = {
        weight_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    for pattern in config.freeze:
        if not any(re.search(pattern, name) for name in named):
            raise UserError(
                f"config.freeze has the pattern {pattern!r}, which is in none of the "
                f"weights' names: they are {', '.join(sorted(named))}"
            )
    free = lambda path: not any(re.search(p, weight_name(path)) for p in config.freeze)
    trained, frozen = split(params, free)
    if not trained:
        raise UserError(
            f"config.freeze={tuple(config.freeze)} freezes all of the model: nothing "
            "is left to train"
        )
    return Parts(trained, frozen)


def reference_of(config: ConfigDict, parts: Parts) -> Any:
    """The weights before training, to compare with: no copy where all is frozen.

    An adapter that is left out is the base model. Else the trained part is copied, for
    its buffers are given away in the first update.
    """
    if config.lora.rank:
        return parts.frozen
    return join(loading.copy(parts.trained), parts.frozen)


def export(
    config: ConfigDict,
    files: run_files.RunFiles,
    loaded: loading.Loaded,
    parts: Parts,
    tokenizer: Any,
) -> None:
    """Writes the model as transformers reads it, and an adapter as PEFT does too."""
    whole = merged(config, join(*parts))
    loading.export(config, files, loaded, whole, tokenizer)
    if config.lora.rank:
        settings = config.lora.to_dict()
        base = config.model if isinstance(config.model, str) else ""
        save_adapter(
            files.adapter,
            parts.trained,
            loaded.model.config,
            loaded.hf_config,
            **settings,
            base_model=base,
        )


def merged(config: ConfigDict, params: Any) -> Any:
    """The weights as one model without an adapter, to be written."""
    if not config.lora.rank:
        return params
    adapter, base = split(params, lora.is_adapter)
    return lora.merge(base, adapter, scale=config.lora.alpha / config.lora.rank)


def _new_adapter(config, params, mesh):
    def init(key):
        shapes = jax.eval_shape(lambda: params)
        rank, targets = config.lora.rank, tuple(config.lora.targets)
        return lora.init_adapter(shapes, key, rank=rank, targets=targets)

    # Apart from the key that a scalar head is drawn from.
    key = jax.random.fold_in(keys.branch_key(config.seed, keys.INIT, 0), 1)
    shardings = sharding.param_shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=shardings)(key)

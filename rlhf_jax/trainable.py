"""What of a model is trained: all of it, all that no pattern freezes, or an adapter.

A trainer's state holds the trained part alone, and so do its optimizer and its
checkpoints; the frozen part is an argument of its compiled functions.

An adapter is fresh, or one on disk that training goes on from (`config.lora.start`).
The reference policy is always what training starts from: with a fresh adapter the model
without it, else the model with the adapter as it lay on disk.
"""

import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax import keys, loading, run_files, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.model_files import find_model, read_config
from rlhf_jax.models.peft_files import PeftAdapter, load_adapter, save_adapter
from rlhf_jax.trees import join, split, weight_name

# Settings that an adapter and the config that goes on with it must agree in.
AGREE = ("rank", "alpha", "targets")


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
        are trained; else all whose path no pattern of `freeze` is found in. With
        `lora.start` the adapter is read from there, and its head, if it has one, takes
        the place of the model's own.
      params: the weights of the model, on the mesh.
      mesh: where the adapter goes.

    Raises:
      UserError: a pattern that freezes nothing, or all; targets that are not there; an
        adapter to start from that is none, or is not what the config asks for.
    """
    if _start(config) and not config.lora.rank:
        raise UserError(
            f"config.lora.start={_start(config)!r} has no meaning with "
            "config.lora.rank=0, which trains no adapter: set the rank, alpha and "
            "targets of the adapter"
        )
    if config.lora.rank:
        if config.freeze:
            raise UserError(
                "config.freeze has no meaning with config.lora.rank: all but the "
                "adapter is frozen"
            )
        adapter = _new_adapter(config, params, mesh)
        if "score" in adapter:
            params = {name: x for name, x in params.items() if name != "score"}
        params = join(params, adapter)
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


def start_of(config: ConfigDict, parts: Parts) -> Any:
    """The weights before training, whose buffers the first update gives away.

    A fresh adapter changes nothing: left out, it is the base model.
    """
    if _is_fresh(config):
        return parts.frozen
    return join(parts.trained, parts.frozen)


def reference_of(config: ConfigDict, parts: Parts) -> Any:
    """The weights before training, to compare with as long as training goes on.

    The trained part is copied: all that is not frozen, or an adapter that was started
    from. With a fresh adapter there is no copy, for the reference is the base model.
    """
    if _is_fresh(config):
        return parts.frozen
    return start_of(config, parts._replace(trained=loading.copy(parts.trained)))


def export(
    config: ConfigDict,
    files: run_files.RunFiles,
    loaded: loading.Loaded,
    parts: Parts,
    tokenizer: Any,
) -> None:
    """Writes the model as transformers reads it, and an adapter as PEFT does too.

    PEFT has no place for a head's bias: such an adapter is in the model alone.
    """
    whole = merged(config, join(*parts))
    loading.export(config, files, loaded, whole, tokenizer)
    if config.lora.rank and "bias" not in parts.trained.get("score", {}):
        settings = {name: config.lora[name] for name in (*AGREE, "dropout")}
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


def _start(config: ConfigDict) -> str:
    """Where the adapter to start from lies, "" for none."""
    return config.lora.get("start", "")


def _is_fresh(config: ConfigDict) -> bool:
    """Whether an adapter is trained that changed nothing before."""
    return bool(config.lora.rank and not _start(config))


def _new_adapter(config: ConfigDict, params: Any, mesh: Mesh) -> Any:
    """The adapter that training starts with, with `score` if it has a head of its own.

    A fresh one is drawn from the seed, and has no head.
    """
    if _start(config):
        return _read_adapter(config, params, mesh)

    def init(key):
        shapes = jax.eval_shape(lambda: params)
        rank, targets = config.lora.rank, tuple(config.lora.targets)
        return lora.init_adapter(shapes, key, rank=rank, targets=targets)

    # Apart from the key that a scalar head is drawn from.
    key = jax.random.fold_in(keys.branch_key(config.seed, keys.INIT, 0), 1)
    shardings = sharding.param_shardings(jax.eval_shape(init, key), mesh)
    return jax.jit(init, out_shardings=shardings)(key)


def _read_adapter(config: ConfigDict, params: Any, mesh: Mesh) -> Any:
    """The adapter of `config.lora.start`, if it is what the config trains."""
    folder = pathlib.Path(_start(config)).expanduser()
    of_run = run_files.RunFiles(folder).adapter
    folder = of_run if of_run.is_dir() else folder
    hf_config = _hf_config(config.model)
    found = load_adapter(folder, config_from_hf(hf_config), hf_config, mesh=mesh)
    _check_agrees(config.lora, found, folder)
    head = found.adapter.get("score", {}).get("kernel")
    if head is not None:
        own = params.get("score", {}).get("kernel")
        if own is None or own.shape != head.shape:
            raise UserError(
                f"the adapter {folder} has a score head, which {config.algorithm} "
                "does not train: start from the adapter of a language model"
            )
    return found.adapter


def _hf_config(source: str | ConfigDict) -> dict[str, Any]:
    """The config.json of `config.model`, which tells how modules are called."""
    if not isinstance(source, str):
        return source.to_dict()
    return read_config(
        find_model(loading.BUILTIN.get(source) or run_files.exported(source))
    )


def _check_agrees(
    settings: ConfigDict, found: PeftAdapter, folder: pathlib.Path
) -> None:
    """Raises a `UserError` where an adapter is not what `config.lora` says it is."""
    same = {
        "rank": found.rank == settings.rank,
        "alpha": math.isclose(found.alpha, settings.alpha, rel_tol=1e-6),
        "targets": set(found.targets) == set(settings.targets),
    }
    differ = [
        f"{name} {getattr(found, name)}, but config.lora.{name} is {settings[name]}"
        for name in AGREE
        if not same[name]
    ]
    if differ:
        raise UserError(
            f"the adapter {folder} has {'; '.join(differ)}: training goes on with what "
            "the adapter has, so give the config the same"
        )

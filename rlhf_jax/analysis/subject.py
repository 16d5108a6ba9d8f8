"""A finished or running run, opened to be analysed: its models, prompts and phases."""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import checkpoint, loading, run_files, sharding, trainable
from rlhf_jax.data.prompts import Prompts, load_both
from rlhf_jax.errors import UserError
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import Reward, build_rewards
from rlhf_jax.rollout.sampler import Sampler, sampler_of
from rlhf_jax.trees import join


class Subject(NamedTuple):
    """What `open_subject` found.

    Attributes:
      files: the run's folder.
      config: the run's own, with the mesh of this process.
      mesh: where everything is computed.
      model: the policy's functions.
      reference: the weights that the run started from.
      trained: shapes and shardings of what a checkpoint holds.
      frozen: the rest of the weights, or None.
      tokenizer: of the policy.
      sample: the run's sampler.
      prompts: by split, "train" and "heldout".
      rewards: what the policy was trained on, without a safety filter's penalty.
      judges: what it was not.
    """

    files: run_files.RunFiles
    config: ConfigDict
    mesh: Mesh
    model: Model
    reference: Any
    trained: Any
    frozen: Any | None
    tokenizer: Any
    sample: Sampler
    prompts: dict[str, Prompts]
    rewards: Sequence[Reward]
    judges: Sequence[Reward]


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The settings of the run in a folder.

    Raises:
      UserError: there is no run, or its settings cannot be read.
    """
    files = run_files.RunFiles(pathlib.Path(workdir).expanduser())
    if not files.workdir.is_dir():
        raise UserError(f"there is no folder {files.workdir}: give that of a run")
    if not files.config.is_file():
        raise UserError(
            f"{files.workdir} holds no run, for it has no config.json: give the "
            "folder that a training wrote to, its config.workdir"
        )
    try:
        found = json.loads(files.config.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{files.config} cannot be read: {error}") from error
    if not isinstance(found, dict) or "algorithm" not in found:
        raise UserError(
            f"{files.config} names no algorithm: it is not the config of a run"
        )
    return ConfigDict(found)


def open_subject(
    workdir: str | os.PathLike, *, mesh: Mesh | None = None, console: Console
) -> Subject:
    """Loads what the phases of a run have in common.

    Args:
      workdir: the run's folder; the run may be going on.
      mesh: None for all devices, cut as the run's own where that fits.
      console: where notes go.

    Raises:
      UserError: no run, one of an algorithm without prompts, of another version, or
        its model, prompts or rewards are gone.
    """
    config = read_config(workdir)
    lacking = [name for name in ("rollout", "rewards", "lora") if name not in config]
    if lacking:
        raise UserError(
            f"{workdir} is a run of {config.algorithm} whose settings have no "
            f"{' and no '.join(lacking)}: what is analysed are policies that answer "
            "prompts for a reward (ppo, grpo, dpo), trained by this version"
        )
    try:
        return _open(workdir, config, mesh or _mesh_of(config), console)
    except (AttributeError, KeyError) as error:
        name = _missing_setting(error)
        if name is None:
            raise
        raise UserError(
            f"{workdir} was written by another version: its settings have no {name!r}"
        ) from error


def policy_of(subject: Subject, phase: int) -> Any:
    """The whole weights that were saved after a phase, on the subject's mesh.

    Raises:
      UserError: there is no such phase, or it cannot be read.
    """
    found = checkpoint.restore_policy(subject.files.checkpoints, phase, subject.trained)
    return join(found, subject.frozen)


def saved_phases(workdir: str | os.PathLike) -> list[int]:
    """The phases with a finished checkpoint, in order."""
    files = run_files.RunFiles(pathlib.Path(workdir).expanduser())
    return checkpoint.saved_phases(files.checkpoints)


def known_phases(workdir: str | os.PathLike) -> list[int]:
    """The phases with a checkpoint, or, where none is left, with held-out responses."""
    return saved_phases(workdir) or run_files.response_phases(workdir, "heldout")


def _missing_setting(error: AttributeError | KeyError) -> str | None:
    """What a config was asked for in vain; None where the error is of another kind."""
    if isinstance(error, AttributeError):
        return error.name if isinstance(error.obj, ConfigDict) else None
    # A ConfigDict's own KeyError has the key in quotes, and a guess in the next line.
    quoted = re.match(r"'(\w+)'", str(error.args[0]))
    return quoted[1] if quoted else None


def _mesh_of(config: ConfigDict) -> Mesh:
    try:
        return sharding.make_mesh(**config.mesh)
    except UserError:  # the run had other devices
        return sharding.make_mesh()


def _open(workdir, config: ConfigDict, mesh: Mesh, console: Console) -> Subject:
    with jax.set_mesh(mesh):
        loaded = loading.load_model(config.model, config, mesh)
        tokenizer = loading.load_run_tokenizer(config, console)
        parts = trainable.cut(config, loaded.params, mesh)
        abstract = checkpoint.abstract(parts.trained)
        # A preference run has its prompts apart from its pairs.
        data = config.data if "train" in config.data else config.prompts
        train, heldout = load_both(
            data, tokenizer, prompt_tokens=config.rollout.prompt_tokens
        )
        return Subject(
            files=run_files.RunFiles(pathlib.Path(workdir).expanduser()),
            config=config,
            mesh=mesh,
            model=loaded.model,
            reference=trainable.start_of(config, parts),
            trained=abstract,
            frozen=parts.frozen,
            tokenizer=tokenizer,
            sample=sampler_of(config.rollout, loaded.model, tokenizer, mesh),
            prompts={"train": train, "heldout": heldout},
            rewards=build_rewards(config.rewards, mesh=mesh),
            judges=build_rewards(config.get("judges", {}), mesh=mesh),
        )

"""Checkpoints of a run: one Orbax step a phase, written in the background.

A step holds three items, `checkpoints/<phase>/{policy,train,meta}`:
  policy  the policy's params, restorable alone (analysis and export need no more)
  train   any pytree besides: optimizer state, critic, counters, typed keys, controllers
  meta    a small JSON object

Typical use, in a trainer:

    manager = open_checkpoints(workdir / "checkpoints", keep=3)
    restored = restore(manager, policy=abstract_params, train=abstract_train)
    ...
    save(manager, phase, policy=state.params, train=train, meta={"config": ...})
    close(manager)

`abstract_*` are trees of `jax.ShapeDtypeStruct` whose shardings say where each leaf
goes (`abstract`), so a checkpoint saved on one mesh restores on another.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

PyTree = Any


class Restored(NamedTuple):
    """A checkpoint read back; `phase` is the phase it was saved after."""

    phase: int
    policy: PyTree
    train: PyTree
    meta: dict[str, Any]


def open_checkpoints(
    directory: str | os.PathLike, *, keep: int | None = None, keep_every: int = 0
) -> ocp.CheckpointManager:
    """Opens (and creates) a run's checkpoint folder for its one writer, the trainer.

    Whatever a killed process left half-written is removed.

    Args:
      directory: The folder, `runs/<name>/checkpoints`.
      keep: How many of the newest checkpoints stay; None keeps every one.
      keep_every: Besides those, every phase divisible by this stays; 0 for none.

    Returns:
      The manager that the other functions of this module take.

    Raises:
      UserError: The folder cannot be made or written.
    """
    directory = pathlib.Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the checkpoint folder {directory}: {error.strerror}; "
            "choose another workdir"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(
            f"the checkpoint folder {directory} is not writable; "
            "choose another workdir or change its permissions"
        )
    ocp = _orbax()
    policies = ocp.checkpoint_managers
    preserve = [policies.LatestN(keep)]  # None keeps all
    if keep_every:
        preserve.append(policies.EveryNSteps(keep_every))
    return ocp.CheckpointManager(
        directory,
        item_names=("policy", "train", "meta"),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            cleanup_tmp_directories=True,
            # Made in the background, a folder that cannot be made leaves threads
            # that hold up the end of the process for five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    phase: int,
    *,
    policy: PyTree,
    train: PyTree,
    meta: dict[str, Any],
) -> None:
    """Starts to save a phase; the writing goes on in the background.

    The arrays may be donated or the numpy leaves overwritten as soon as this returns.
    A save still under way is waited for first, and its failure raised here.

    Args:
      manager: From `open_checkpoints`.
      phase: The phases done so far; each may be saved once.
      policy: The policy's params.
      train: A pytree of arrays, typed keys and Python numbers.
      meta: JSON-serializable.

    Raises:
      UserError: The disk is full or the folder went away.
      ValueError: This phase was saved before.
    """
    args = _orbax().args
    wait(manager)
    _hush()
    with _disk_errors(manager.directory, OSError):
        saved = phase not in manager.all_steps() and manager.save(
            phase,
            args=args.Composite(
                policy=args.StandardSave(policy),
                train=args.StandardSave(train),
                meta=args.JsonSave(json.loads(json.dumps(meta))),
            ),
            force=True,
        )
    if not saved:
        raise ValueError(f"phase {phase} is already saved in {manager.directory}")


def latest_phase(manager: ocp.CheckpointManager) -> int | None:
    """Returns the newest saved phase, or None."""
    return manager.latest_step()


def restore(
    manager: ocp.CheckpointManager,
    *,
    policy: PyTree,
    train: PyTree,
    say: Callable[[str], None] = print,
) -> Restored | None:
    """Restores the newest checkpoint that can be read.

    One that cannot is reported in a sentence, and set aside as `<phase>.unreadable`
    once an older one has been read, so that its phase can be saved again. Several
    processes agree on the phase: it is the newest that every one of them can read.

    Args:
      manager: From `open_checkpoints`.
      policy: Abstract params: shapes, dtypes and shardings (`abstract`).
      train: The same for `train`.
      say: Gets the sentence.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      UserError: There are checkpoints, and none can be read into these trees.
    """
    failed: dict[int, Exception] = {}
    for phase in sorted(manager.all_steps(), reverse=True):
        found = _try_to_read(_read, manager, phase, policy, train)
        unread = _processes_without(found)
        if not unread:
            for bad in failed:
                aside = _set_aside(manager, bad)
                say(
                    f"checkpoint {manager.directory / str(bad)} cannot be read and was "
                    f"set aside as {aside.name}; going on from phase {phase}"
                )
            return found
        if isinstance(found, Restored):
            found = ValueError(f"process {unread[0]} of the run cannot read it")
        failed[phase] = found
    if not failed:
        return None
    newest = max(failed)
    raise UserError(
        f"no checkpoint in {manager.directory} can be read into this model and "
        f"optimizer (phase {newest}: {_cause(failed[newest])}); "
        "delete the run folder to start afresh, or choose another workdir"
    ) from failed[newest]


def restore_policy(
    directory: str | os.PathLike, phase: int | None, abstract_policy: PyTree
) -> PyTree:
    """Restores the params of one phase, without a manager: the run may be live.

    Args:
      directory: A run's `checkpoints` folder.
      phase: Which phase; None for the newest.
      abstract_policy: Shapes, dtypes and shardings (`abstract`).

    Raises:
      UserError: There is no such phase, or it cannot be read into this tree.
    """
    phases = saved_phases(directory)
    if not phases:
        raise UserError(f"there are no checkpoints in {directory}")
    if phase is None:
        phase = phases[-1]
    if phase not in phases:
        raise UserError(
            f"{directory} has no checkpoint of phase {phase}; "
            f"saved phases: {', '.join(map(str, phases))}"
        )
    path = pathlib.Path(directory).absolute() / str(phase)
    with _orbax().StandardCheckpointer() as checkpointer:
        found = _try_to_read(checkpointer.restore, path / "policy", abstract_policy)
    if isinstance(found, Exception):
        raise UserError(
            f"the policy in {path} cannot be read into this model: {_cause(found)}"
        ) from found
    return found


def saved_phases(directory: str | os.PathLike) -> list[int]:
    """Returns the phases with a finished checkpoint in a folder, in order."""
    if not os.path.isdir(directory):
        return []
    return sorted(_orbax().utils.checkpoint_steps(pathlib.Path(directory).absolute()))


def abstract(tree: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Returns the abstract target of a tree: what `restore` wants to know of it.

    Args:
      tree: Arrays or ShapeDtypeStructs (`jax.eval_shape`); other leaves stay.
      shardings: A sharding for every leaf, or one for all; None takes each leaf's own.
    """

    def target(leaf, sharding):
        if not hasattr(leaf, "dtype"):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if shardings is None:
        return jax.tree.map(lambda x: target(x, getattr(x, "sharding", None)), tree)
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: target(x, shardings), tree)
    return jax.tree.map(target, tree, shardings)


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is on disk; raises UserError if it failed."""
    with _disk_errors(manager.directory, OSError, ValueError):
        manager.wait_until_finished()


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for the last save and ends the background threads."""
    with _disk_errors(manager.directory, OSError, ValueError):
        manager.close()


def _orbax():
    """Imports Orbax, which takes half a second, and keeps its log off the terminal.

    Orbax writes some forty lines a save to absl's logger, which command lines built
    on `absl.app` show. Only records from Orbax's own files are dropped, its errors
    too: those that matter are raised as well.
    """
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_not_orbax)
    logging.getLogger("asyncio").addFilter(_not_orbax)
    return orbax.checkpoint


def _not_orbax(record: logging.LogRecord) -> bool:
    text = f"{record.pathname} {record.getMessage()}"
    return "/orbax/" not in text and "OCDBT" not in text  # its file format


@contextlib.contextmanager
def _disk_errors(directory: os.PathLike, *kinds: type[Exception]) -> Iterator[None]:
    """Says in a sentence what Python (OSError) or tensorstore (ValueError) met."""
    try:
        yield
    except kinds as error:
        # The cause is the last part of tensorstore's chain of messages.
        reason = getattr(error, "strerror", None) or str(error).split(": ")[-1]
        raise UserError(
            f"cannot write a checkpoint in {directory}: "
            f"{reason.partition(' [os_error')[0]}; those before it are whole: once "
            "that is mended, the same command goes on from the last one"
        ) from error


def _read(manager, phase: int, policy: PyTree, train: PyTree) -> Restored:
    """Reads what this process needs; the manager's own reading waits for the others.

    One that finds a file damaged would leave them waiting.
    """
    ocp, step = _orbax(), pathlib.Path(manager.directory) / str(phase)

    def tree(name: str, target: PyTree) -> PyTree:
        handler = ocp.StandardCheckpointHandler()
        return handler.restore(step / name, args=ocp.args.StandardRestore(target))

    meta = ocp.JsonCheckpointHandler().restore(
        step / "meta", args=ocp.args.JsonRestore()
    )
    restored = Restored(phase, tree("policy", policy), tree("train", train), meta)
    # Without its file of array types a typed key comes back as plain integers.
    for target, leaf in zip(jax.tree.leaves(train), jax.tree.leaves(restored.train)):
        if getattr(target, "dtype", None) != getattr(leaf, "dtype", None):
            raise TypeError(f"expected {target}, found {leaf}")
    return restored


def _try_to_read(read: Callable, *args) -> Any:
    """Returns what `read(*args)` gives, or the exception of a file that is damaged.

    Running out of memory says nothing about the file and goes up.
    """
    hook = sys.unraisablehook
    _hush()
    try:
        result = read(*args)
    except (RuntimeError, MemoryError):
        raise
    except Exception as error:  # a damaged chunk raises no narrower type
        return error
    sys.unraisablehook = hook
    return result


def _hush() -> None:
    """Keeps the complaints of Orbax's tasks off the terminal.

    One chunk that cannot be read or written ends the whole, and the tasks of the others
    complain, a page each, whenever Python collects them: so this stays.
    """
    hook = sys.unraisablehook
    if getattr(hook, "func", None) is not _unless_orbax:
        sys.unraisablehook = functools.partial(_unless_orbax, hook)


def _unless_orbax(hook: Callable, report: Any) -> None:
    """Passes on but a task of Orbax's, and a late answer to its closed event loop."""
    code = getattr(report.object, "cr_code", None)
    task = code and "/orbax/" in code.co_filename
    if not task and str(report.exc_value) != "Event loop is closed":
        hook(report)


def _processes_without(found: Any) -> list[int]:
    """The processes that did not get a checkpoint, where this one got `found`."""
    got = np.array([isinstance(found, Restored)])
    if jax.process_count() > 1:
        got = multihost_utils.process_allgather(got, tiled=True)
    return np.flatnonzero(~got).tolist()


def _set_aside(manager: ocp.CheckpointManager, phase: int) -> pathlib.Path:
    """Renames a step, so that nothing is lost and Orbax no longer sees it."""
    path = pathlib.Path(manager.directory) / str(phase)
    aside = path.with_name(f"{phase}.unreadable")
    if jax.process_index() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    multihost_utils.sync_global_devices(aside.name)  # all see it gone
    manager.reload()
    return aside


def _cause(error: Exception) -> str:
    """Returns what went wrong, without tensorstore's dump of its own settings."""
    return first_line(error).partition(" See full TensorStore")[0][:200]

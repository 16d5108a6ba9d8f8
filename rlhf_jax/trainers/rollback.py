"""The end of a run that its monitor ended: which phase is exported, and its worth."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax import checkpoint
from rlhf_jax.run_files import RunFiles
from rlhf_jax.watch import Watch


def after_halt(
    action: str,
    files: RunFiles,
    state: Any,
    watch: Watch,
    evaluate: Callable[[Any], tuple[dict, Any]],
    say: Callable[[str], None],
) -> Any:
    """The state to export: of a run that is rolled back with the last good policy.

    That is the newest saved one from before the first phase that the alert is about.
    What it is worth is kept in the run's folder, for `exported_row`.

    Args:
      action: `config.monitor.action`.
      files: of the run.
      state: after the last phase.
      watch: what the monitor has seen.
      evaluate: `Hooks.evaluate`.
      say: gets sentences.
    """
    if jax.process_index() == 0:
        _kept(files).unlink(missing_ok=True)
    alert = watch.halted
    if alert is None:
        return state
    say(
        f"the monitor ended the training ({alert.rule}); to go on all the same, give "
        "--config.monitor.action=warn"
    )
    saved = checkpoint.saved_phases(files.checkpoints)
    good = [phase for phase in saved if phase < alert.since]
    if action != "rollback":
        return state
    if not good:
        say(
            f"no phase before {alert.since} is saved any more, so the last one is "
            "exported: to roll back next time, raise config.checkpoint.keep"
        )
        return state
    say(f"rolled back to phase {good[-1]}, the last one saved before it went wrong")
    target = checkpoint.abstract(state.policy)
    policy = checkpoint.restore_policy(files.checkpoints, good[-1], target)
    state = dataclasses.replace(state, policy=policy)
    metrics, _ = evaluate(state)
    if jax.process_index() == 0:
        row = {"phase": good[-1]} | {name: float(x) for name, x in metrics.items()}
        _kept(files).write_text(json.dumps(row), encoding="utf-8")
    return state


def exported_row(files: RunFiles) -> dict[str, Any] | None:
    """Phase and held-out figures of what a rolled-back run exports; else None."""
    path = _kept(files)
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def _kept(files: RunFiles) -> pathlib.Path:
    return files.workdir / "rolled_back.json"

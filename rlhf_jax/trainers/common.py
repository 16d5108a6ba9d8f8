"""What every trainer does around its algorithm: loop, log, save, resume, report.

A trainer gives `run_loop` its state and a few functions (`Hooks`); everything that is
about cadence, files and what a person sees is here.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import checkpoint, memory, plots, progress, run_files, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import open_writers
from rlhf_jax.watch import Watch

# Settings that a resumed run may give differently: none of them changes a number, the
# mesh none beyond round-off.
MAY_CHANGE = ("workdir", "logging", "checkpoint", "mesh", "monitor")


class Hooks(NamedTuple):
    """What a trainer gives the loop.

    Attributes:
      run_phase: `(state, phase) -> (state, metrics, rows)`; metrics are scalars, on
        device or not; rows are the samples of the phase, one dict each, or none. The
        state has the model being trained as `.policy`, and is donated.
      evaluate: `state -> (metrics, rows)` on held-out data. A row's "split" tells the
        two apart.
      fields: metrics key -> how the progress line shows it.
      panels: what `curves.png` shows.
      headline: (label, key of the mean, key of the std or None) of the held-out figures
        that the closing summary compares.
    """

    run_phase: Callable[[Any, int], tuple[Any, dict, Sequence[Mapping[str, Any]]]]
    evaluate: Callable[[Any], tuple[dict, Sequence[Mapping[str, Any]]]]
    fields: Mapping[str, str]
    panels: Sequence[plots.Panel]
    headline: Sequence[tuple[str, str, str | None]]


def open_workdir(config: ConfigDict) -> run_files.RunFiles:
    """Makes or finds the run's folder; a `UserError` if it holds another run."""
    return run_files.open_run(config.workdir, config.to_dict(), may_change=MAY_CHANGE)


def check_ranges(config: ConfigDict, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises a `UserError` for the first setting outside its (low, high)."""
    settings = config.to_dict()
    for name, (low, high) in ranges.items():
        value = functools.reduce(
            lambda tree, part: tree[part], name.split("."), settings
        )
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"in {low}..{high}"
            raise UserError(f"config.{name}={value} must be {bounds}")


def print_plan(
    console: Console, config: ConfigDict, mesh: Mesh, models: Mapping[str, Any]
) -> None:
    """Shows where the run computes and how each model is cut over the mesh."""
    axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    device = mesh.devices.flat[0]
    rows = [
        ("mesh", f"{axes} on {mesh.size} {device.device_kind} device(s)"),
        ("compute", f"{config.dtype}, masters and optimizer in float32"),
    ]
    for name, params in models.items():
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        held = sum(row.bytes_per_device for row in sharding.plan(params, mesh))
        rows.append((name, f"{size:,} parameters, {held / 1e6:,.1f} MB a device"))
    if mesh.size > 1:
        for row in sharding.plan(next(iter(models.values())), mesh):
            rows.append((f"  {row.path}", f"{row.shape}: {row.spec}"))
    progress.show_plan(console, f"rlhf_jax {config.algorithm}", rows)


def run_loop(
    config: ConfigDict,
    files: run_files.RunFiles,
    console: Console,
    state: Any,
    hooks: Hooks,
) -> Any:
    """Runs phases 1 to `config.total_phases`, from the newest checkpoint if any.

    Phase 0 is the untrained model, evaluated and saved, so that everything after it
    can be compared and resumed. The metrics of a phase are fetched while the next one
    computes, and always before its checkpoint is written: after a kill, what the run
    folder holds past the restored phase is dropped and made again, bit for bit.

    Returns:
      The trained state.

    Raises:
      UserError: a metric is not finite.
    """
    memory.reset_peak_memory()
    manager = checkpoint.open_checkpoints(
        files.checkpoints,
        keep=config.checkpoint.keep or None,
        keep_every=config.checkpoint.keep_every,
    )
    say = lambda text: progress.say(console, text)
    state, done = _restore(manager, state, say)
    run_files.drop_after(files, -1 if done is None else done)
    writers = open_writers(
        files,
        first_phase=0 if done is None else done + 1,
        config=config.to_dict(),
        **config.logging,
    )
    bar = progress.open_progress(
        console, config.total_phases, hooks.fields, first=done or 0
    )
    watch = Watch(config.monitor, files, say, done=done)
    log = _Log(writers.write, bar.update, watch.see)
    finish = functools.partial(_finish_phase, config, files, console, manager, log)
    try:
        if done is None:
            done = 0
            metrics, rows = hooks.evaluate(state)
            log.put(0, metrics | watch.judge_drop(rows))
            finish(state, 0, rows)
        for phase in range(done + 1, config.total_phases + 1):
            if watch.halted:
                break
            started = time.perf_counter()
            state, metrics, rows = hooks.run_phase(state, phase)
            log.flush()
            last = phase == config.total_phases or bool(watch.halted)
            last = last or watch.would_halt(phase, metrics)
            if last or _due(phase, config.evaluate_every):
                held_out, held_out_rows = hooks.evaluate(state)
                metrics |= held_out | watch.judge_drop(held_out_rows)
                rows = [*held_out_rows, *rows]
            log.put(phase, metrics | _measured(started))
            finish(state, phase, rows, last=last)
        log.flush()
        checkpoint.wait(manager)
        state = _after_halt(config, files, state, watch, say)
    except KeyboardInterrupt:
        say("stopped by hand; the same command goes on from the last checkpoint")
        raise
    finally:
        bar.close()
        writers.close()
        checkpoint.close(manager)
    return state


class _Log:
    """Holds the newest phase's metrics until they are asked for, one step late."""

    def __init__(self, write, show, watch):
        self._write, self._show, self._watch = write, show, watch
        self._pending: tuple[int, dict] | None = None

    def put(self, phase: int, metrics: dict) -> None:
        self.flush()
        self._pending = phase, metrics

    def flush(self) -> None:
        if self._pending is None:
            return
        (phase, metrics), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        bad = [key for key, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"phase {phase}: {', '.join(bad)} is not finite, so training stops; "
                "nothing past the last checkpoint was saved: lower the learning rate, "
                "or clip gradients with config.optimizer.clip_norm"
            )
        self._write(phase, metrics)
        self._show(phase, metrics)
        self._watch(phase, metrics)


def _restore(
    manager: Any, state: Any, say: Callable[[str], None]
) -> tuple[Any, int | None]:
    """The newest checkpoint in place of `state`, and its phase; or `state`, None.

    The fresh state is freed before the other is read: a device need not hold both.
    """
    if checkpoint.latest_phase(manager) is None:
        return state, None
    policy = checkpoint.abstract(state.policy)
    train = checkpoint.abstract(_train_item(state))
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    restored = checkpoint.restore(manager, policy=policy, train=train, say=say)
    parts = jax.tree.unflatten(
        jax.tree.structure(train), jax.tree.leaves(restored.train)
    )
    say(f"going on after phase {restored.phase}")
    return dataclasses.replace(state, policy=restored.policy, **parts), restored.phase


def _train_item(state: Any) -> dict[str, Any]:
    """All of the state but the policy, as the checkpoint's item `train`."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    fields.pop("policy")
    return fields


def _measured(started: float) -> dict[str, float]:
    """What a phase took, evaluation and all: seconds, and the peak of memory so far."""
    peak = memory.peak_memory()
    found = {} if peak is None else {"time/peak_gib": peak / 2**30}
    return {"time/phase_s": time.perf_counter() - started} | found


def _due(phase: int, every: int) -> bool:
    return phase == 0 or (every > 0 and phase % every == 0)


def _after_halt(
    config: ConfigDict,
    files: run_files.RunFiles,
    state: Any,
    watch: Watch,
    say: Callable[[str], None],
) -> Any:
    """The state to export: of a run that is rolled back with the last good policy.

    That is the newest saved one from before the first phase that the alert is about.
    """
    alert = watch.halted
    if alert is None:
        return state
    say(
        f"the monitor ended the training ({alert.rule}); to go on all the same, give "
        "--config.monitor.action=warn"
    )
    saved = checkpoint.saved_phases(files.checkpoints)
    good = [phase for phase in saved if phase < alert.since]
    if config.monitor.action != "rollback":
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
    return dataclasses.replace(state, policy=policy)


def _finish_phase(
    config, files, console, manager, log, state, phase, rows, *, last=False
) -> None:
    """Writes what a phase leaves behind: responses, samples, and its checkpoint."""
    if rows:
        run_files.write_responses(files, phase, rows)
    if last or _due(phase, config.samples_every):
        columns = ("prompt", "response", "reward", "kl")
        shown = [
            {c: row[c] for c in columns if c in row}
            for row in rows[: progress.MAX_SAMPLES]
        ]
        progress.show_samples(console, f"samples of phase {phase}", shown)
        run_files.append_samples(files, phase, shown)
    if last or _due(phase, config.checkpoint.every):
        log.flush()
        checkpoint.save(
            manager,
            phase,
            policy=state.policy,
            train=_train_item(state),
            meta={"phase": phase, "algorithm": config.algorithm},
        )


def close_run(
    files: run_files.RunFiles,
    console: Console,
    hooks: Hooks,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    figures: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Draws the curves and shows what changed from phase 0 to the last.

    `facts` are shown below that, and `figures` are for summary.json.
    """
    if jax.process_index() != 0:
        return
    rows = run_files.read_metrics(files.workdir)
    first, last = rows[0], rows[-1]
    changes, summary = [], {"phases": last["phase"]}
    for label, mean, std in hooks.headline:
        if mean in first and mean in last:
            spread = (first[std], last[std]) if std else (None, None)
            changes.append(progress.Change(label, first[mean], last[mean], *spread))
            keys = (mean, std) if std else (mean,)
            summary |= {key: {"before": first[key], "after": last[key]} for key in keys}
    run_files.write_summary(files, summary | figures)
    plots.plot_curves(rows, files.curves, hooks.panels, title=title)
    kept = [
        ("curves", files.curves),
        ("metrics", files.metrics),
        ("alerts", files.alerts),
        ("responses", files.responses),
        ("samples", files.samples),
        ("checkpoints", files.checkpoints),
        ("model", files.export),
    ]
    listing = [(label, str(path)) for label, path in kept if path.exists()]
    progress.show_summary(console, title, changes, [*facts, *listing])

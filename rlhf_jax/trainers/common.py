"""What every trainer does around its algorithm: loop, log, save, resume, report.

A trainer gives `run_loop` its state and a few functions (`Hooks`); everything that is
about cadence, files and what a person sees is here.
"""

import contextlib
import dataclasses
import errno
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import (
    checkpoint,
    memory,
    nonfinite,
    plots,
    preemption,
    preflight,
    progress,
    run_files,
    sharding,
)
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import open_writers
from rlhf_jax.trainers.rollback import after_halt, exported_row
from rlhf_jax.watch import Watch

# Settings that a resumed run may give differently: none of them changes a number of a
# healthy run, the mesh none beyond round-off.
MAY_CHANGE = (
    *("workdir", "logging", "checkpoint", "mesh", "monitor"),
    *("nonfinite", "grace_s"),
)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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
    """Shows where the run computes, how models are cut, and the memory it will need."""
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
    needed, advice = preflight.rows(config, mesh, preflight.capacity(mesh))
    rows += needed
    if advice is not None:
        rows.append(("  too much", advice))
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
    folder holds past the restored phase is dropped and made again, bit for bit. Going
    back from numbers that are not finite is the same, but for the phase left out.

    Returns:
      The trained state.

    Raises:
      UserError: a number is not finite, or the disk cannot be written.
      Stopped: SIGTERM or Ctrl-C, see `preemption`.
    """
    check_ranges(config, {"grace_s": (0, math.inf)})
    memory.reset_peak_memory()
    say = lambda text: progress.say(console, text)
    left_out: tuple[int, ...] = ()
    with preemption.listen(config.grace_s, say) as stop, _disk_errors(files):
        while True:
            try:
                return _train(config, files, console, state, hooks, stop, left_out)
            except nonfinite.BadPhaseError as bad:
                say(f"{bad}; it is left out, from the newest checkpoint on")
                left_out = (*left_out, bad.phase)


def _train(
    config: ConfigDict,
    files: run_files.RunFiles,
    console: Console,
    state: Any,
    hooks: Hooks,
    stop: preemption.Stop,
    left_out: tuple[int, ...],
) -> Any:
    """`run_loop` without the phases `left_out`; raises `BadPhaseError` at one more."""
    say = lambda text: progress.say(console, text)
    manager = checkpoint.open_checkpoints(
        files.checkpoints,
        keep=config.checkpoint.keep or None,
        keep_every=config.checkpoint.keep_every,
    )
    state, done, meta = _restore(manager, state, say)
    left_out = tuple(sorted({*left_out, *meta.get("left_out", ())}))
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
    judge = nonfinite.Judge(config.nonfinite, say, state, left_out)
    log = _Log(writers.write, bar.update, watch.see, judge.see)
    save = functools.partial(_save, config, manager, log, left_out)
    finish = functools.partial(_finish_phase, config, files, console, save)
    try:
        if done is None:
            done = 0
            metrics, rows = hooks.evaluate(state)
            log.put(state, 0, metrics | watch.judge_drop(rows))
            finish(state, 0, rows)
        for phase in range(done + 1, config.total_phases + 1):
            if watch.halted:
                break
            if stop.asked(phase):
                _leave(stop, manager, save, state, done, say)
            started = time.perf_counter()
            with stop.may_drop():
                after = _run_phase(hooks, state, phase, left_out)
            state, metrics, rows = after
            log.flush()
            last = phase == config.total_phases or bool(watch.halted)
            last = last or watch.would_halt(phase, metrics)
            if last or _due(phase, config.evaluate_every):
                held_out, held_out_rows = hooks.evaluate(state)
                metrics |= held_out | watch.judge_drop(held_out_rows)
                rows = [*held_out_rows, *rows]
            log.put(state, phase, metrics | _measured(started))
            finish(state, phase, rows, last=last)
            done = phase
        log.flush()
        if stop.asked(config.total_phases + 1):
            _leave(stop, manager, save, state, done, say)
        checkpoint.wait(manager)
        action = config.monitor.action
        state = after_halt(action, files, state, watch, hooks.evaluate, say)
    except preemption.Dropped:
        _leave(stop, manager, save, state, done, say)
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

    def __init__(self, write, show, watch, judge):
        self._write, self._show, self._watch = write, show, watch
        self._judge = judge
        self._pending: tuple[int, dict, Any] | None = None

    def put(self, state: Any, phase: int, metrics: dict) -> None:
        self.flush()
        self._pending = phase, metrics, nonfinite.counts_of(state)

    def flush(self) -> None:
        if self._pending is None:
            return
        (phase, metrics, counts), self._pending = self._pending, None
        metrics = self._judge(phase, *jax.device_get((metrics, counts)))
        self._write(phase, metrics)
        self._show(phase, metrics)
        self._watch(phase, metrics)


@contextlib.contextmanager
def _disk_errors(files: run_files.RunFiles) -> Iterator[None]:
    """Says in a sentence that the disk is full, or a folder went away."""
    try:
        yield
    except OSError as error:
        ours = pathlib.Path(files.workdir).resolve()
        found = error.filename and pathlib.Path(str(error.filename)).resolve()
        inside = bool(found) and found.is_relative_to(ours)
        if error.errno not in DISK_ERRORS and not inside:
            raise  # a remote reward's errors are OSErrors too
        place = error.filename or files.workdir
        raise UserError(
            f"cannot write {place}: {error.strerror}; the checkpoints up to here are "
            "whole: once that is mended, the same command goes on from the last one"
        ) from error


def _run_phase(hooks: Hooks, state: Any, phase: int, left_out: Sequence[int]):
    """What the hook gives; a phase that is left out changes nothing."""
    if phase in left_out:
        return state, {"nonfinite/left_out": 1.0}, []
    return hooks.run_phase(state, phase)


def _leave(stop, manager, save, state, phase: int, say) -> None:
    """Saves what was reached, and ends the process as it was asked to.

    The state before a phase that was dropped is gone once its update has begun.
    """
    lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    if not lost and checkpoint.latest_phase(manager) != phase:
        save(state, phase)
    checkpoint.wait(manager)
    reached = checkpoint.latest_phase(manager)
    say(f"stopped; phase {reached} is saved, and the same command goes on from there")
    raise preemption.Stopped(stop.signum)


def _restore(
    manager: Any, state: Any, say: Callable[[str], None]
) -> tuple[Any, int | None, dict[str, Any]]:
    """The newest checkpoint in place of `state`, its phase and meta; or `state`, None.

    The fresh state is freed before the other is read: a device need not hold both.
    """
    if checkpoint.latest_phase(manager) is None:
        return state, None, {}
    policy = checkpoint.abstract(state.policy)
    train = checkpoint.abstract(_train_item(state))
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    restored = checkpoint.restore(manager, policy=policy, train=train, say=say)
    parts = jax.tree.unflatten(
        jax.tree.structure(train), jax.tree.leaves(restored.train)
    )
    say(f"going on after phase {restored.phase}")
    state = dataclasses.replace(state, policy=restored.policy, **parts)
    return state, restored.phase, restored.meta


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


def _save(config, manager, log, left_out, state, phase) -> None:
    """Starts to save a phase, whose metrics are seen and written first."""
    log.flush()
    meta = {"phase": phase, "algorithm": config.algorithm}
    if left_out:
        meta["left_out"] = list(left_out)
    train = _train_item(state)
    checkpoint.save(manager, phase, policy=state.policy, train=train, meta=meta)


def _finish_phase(
    config, files, console, save, state, phase, rows, *, last=False
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
        save(state, phase)


def close_run(
    files: run_files.RunFiles,
    console: Console,
    hooks: Hooks,
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    figures: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Draws the curves and shows what changed from phase 0 to the one exported.

    `facts` are shown below that, and `figures` are for summary.json.
    """
    if jax.process_index() != 0:
        return
    rows = run_files.read_metrics(files.workdir)
    first, last = rows[0], rows[-1]
    changes, summary = [], {"phases": last["phase"]}
    rolled_back = exported_row(files)
    if rolled_back is not None:
        last = rolled_back
        summary["exported"] = last["phase"]
        told = f"phase {last['phase']}, to which the run was rolled back"
        facts = [("exported", told), *facts]
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

"""Runs that meet a signal, a full disk, a lost folder, or numbers that are not finite.

Whatever it was, the same command afterwards ends as the run that nothing disturbed.
"""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from rlhf_jax import checkpoint, preemption, run_files
from rlhf_jax.errors import UserError
from rlhf_jax.trainers import ppo

from .runs import ROOT, assert_same_run, command, metrics_of

PHASES = 6


def configure(world, workdir, **changes):
    """Six phases, of which phases 0, 3 and 6 are saved, and 0 and 6 evaluated."""
    settings = {"total_phases": PHASES, "evaluate_every": 0, "samples_every": 2}
    return world.ppo_config(workdir, **settings | changes)


@pytest.fixture(scope="module")
def straight(world, run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("faults") / "straight"
    run(configure(world, workdir))
    return workdir


@pytest.fixture
def during(monkeypatch):
    """`during(phase, act)`: what happens when that phase's responses are scored."""

    def patch(phase, act):
        make_collect = ppo.online.make_collect

        def made(*arguments):
            collect = make_collect(*arguments)

            def collected(params, number, *turn):
                found = collect(params, number, *turn)
                changed = act(found) if number == phase else None
                return found if changed is None else changed

            return collected

        monkeypatch.setattr(ppo.online, "make_collect", made)

    yield patch


def go_on_and_compare(world, run, workdir, straight, monkeypatch):
    monkeypatch.undo()
    run(configure(world, workdir))
    assert_same_run(workdir, straight)


def test_sigterm_finishes_and_saves_the_phase(
    world, run, straight, during, tmp_path, monkeypatch, capsys
):
    during(4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(preemption.Stopped) as stopped:
        run(configure(world, tmp_path / "run"))
    assert stopped.value.code == 143
    assert "stopped; phase 4 is saved" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run")[-1]["phase"] == 4
    assert checkpoint.saved_phases(tmp_path / "run" / "checkpoints")[-1] == 4
    go_on_and_compare(world, run, tmp_path / "run", straight, monkeypatch)
    assert "going on after phase 4" in capsys.readouterr().out


def test_out_of_time_the_phase_is_dropped_and_the_one_before_saved(
    world, run, straight, during, tmp_path, monkeypatch, capsys
):
    def twice(_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    during(5, twice)
    with pytest.raises(preemption.Stopped):
        run(configure(world, tmp_path / "run"))
    assert "stopped; phase 4 is saved" in capsys.readouterr().out
    go_on_and_compare(world, run, tmp_path / "run", straight, monkeypatch)


def test_sigterm_in_the_last_phase(
    world, run, straight, during, tmp_path, monkeypatch, capsys
):
    during(PHASES, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(preemption.Stopped):
        run(configure(world, tmp_path / "run"))
    assert not (tmp_path / "run" / "export").exists()
    go_on_and_compare(world, run, tmp_path / "run", straight, monkeypatch)


def test_ctrl_c_is_asked_for_once_and_meant_twice(world, run, during, tmp_path):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    during(2, twice)
    with pytest.raises(KeyboardInterrupt):
        run(configure(world, tmp_path / "run"))
    assert checkpoint.saved_phases(tmp_path / "run" / "checkpoints") == [0]


def test_two_processes_stop_after_the_same_phase(world, alone, tmp_path):
    """Only process 1 gets the signal, by its own hand, in phase 2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    workdir = tmp_path / "two"
    many = ["--config.total_phases=500", "--config.mesh.fsdp=2"]
    processes = [
        subprocess.Popen(
            [*command(world, "ppo", workdir), *many],
            cwd=ROOT,
            env=alone
            | cluster
            | {"JAX_PROCESS_ID": str(number)}
            | ({"TERM_AT_CALL": "3"} if number == 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, complaints) in zip(processes, outputs, strict=True):
        assert process.returncode == 143, complaints
    reached = checkpoint.saved_phases(workdir / "checkpoints")[-1]
    assert 2 <= reached < 500
    assert f"stopped; phase {reached} is saved" in outputs[0][0]
    assert metrics_of(workdir)[-1]["phase"] == reached


def limit_files(size):
    """No file may grow beyond it: what a full disk is, without a disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.parametrize("size", [512, 20_000])
def test_a_full_disk(
    world, run, straight, during, tmp_path, monkeypatch, request, size
):
    """With room for nothing, or for lines of text but no checkpoint."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: limit_files(hard))
    saved = functools.partial(checkpoint.saved_phases, tmp_path / "run" / "checkpoints")

    def fill(_):
        while 3 not in saved():  # it is saved in the background
            time.sleep(0.01)
        limit_files(size)

    during(PHASES, fill)
    with pytest.raises(UserError, match=r"cannot write .*File too large"):
        run(configure(world, tmp_path / "run"))
    limit_files(hard)
    assert saved() == [0, 3]
    go_on_and_compare(world, run, tmp_path / "run", straight, monkeypatch)


def test_a_line_cut_in_the_middle(world, run, straight, tmp_path, monkeypatch):
    """The disk was full in the middle of phase 4's row."""
    append = run_files.append_metrics

    def cut(files, row):
        if row["phase"] == 4:
            with files.metrics.open("a") as file:
                file.write('{"phase": 4, "los')
            raise OSError(errno.ENOSPC, "No space left on device")
        append(files, row)

    monkeypatch.setattr("rlhf_jax.metrics.append_metrics", cut)
    with pytest.raises(UserError, match=r"No space left on device; the checkpoints"):
        run(configure(world, tmp_path / "run"))
    go_on_and_compare(world, run, tmp_path / "run", straight, monkeypatch)


def test_a_folder_that_vanishes(world, run, straight, during, tmp_path, monkeypatch):
    """As a network disk that is unmounted, and comes back."""
    away = tmp_path / "away"
    # Two seconds, for the save of phase 4 in the background to end.
    during(5, lambda _: time.sleep(2) or (shutil.move(tmp_path / "run", away) and None))
    with pytest.raises(UserError, match=r"cannot write .*run/.*No such file"):
        run(configure(world, tmp_path / "run"))
    away.rename(tmp_path / "run")
    go_on_and_compare(world, run, tmp_path / "run", straight, monkeypatch)


def test_other_errors_of_the_system_keep_their_name(world, run, during, tmp_path):
    def refuse(_):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    during(1, refuse)
    with pytest.raises(ConnectionRefusedError):
        run(configure(world, tmp_path / "run"))


def lose_scores(found):
    """A phase whose scores are not finite."""
    return found._replace(scores=found.scores.at[0].set(np.nan))


def checkpoint_tensors(workdir, phase, item):
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(workdir / "checkpoints" / str(phase) / item)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_stop_names_what_went_bad_first(world, run, during, tmp_path):
    during(2, lose_scores)
    bad = r"phase 2: an advantage \(reward/with_kl\) is not finite, so training stops"
    with pytest.raises(UserError, match=bad):
        run(configure(world, tmp_path / "run"))


def test_skip_leaves_weights_and_moments_alone(world, run, during, tmp_path, capsys):
    """Eight steps of phase 2 are left out, and those of phase 3 are not."""
    during(2, lose_scores)
    workdir = tmp_path / "run"
    run(configure(world, workdir, nonfinite="skip", checkpoint__every=1))
    rows = metrics_of(workdir)
    skipped = [row["optimizer/skipped"] for row in rows]
    assert skipped == [0, 0, 8, 0, 0, 0, 0]
    assert "policy/loss" not in rows[2] and "policy/loss" in rows[3]
    assert "phase 2: an advantage" in capsys.readouterr().out
    for item in ("policy", "train"):
        before, after, later = (
            checkpoint_tensors(workdir, phase, item) for phase in (1, 2, 3)
        )
        for counter in ("skipped", "in_row", "first"):
            before.pop(f"['opt_state']['{counter}']", None)
        for key in before:
            np.testing.assert_array_equal(after[key], before[key], err_msg=key)
        assert any((later[key] != before[key]).any() for key in before)


@pytest.fixture(scope="module")
def rolled_back(world, run, tmp_path_factory):
    """A run whose phase 5 is bad, so that it goes back to phase 3."""
    workdir = tmp_path_factory.mktemp("faults") / "rolled_back"
    with pytest.MonkeyPatch.context() as patch:
        lose_phase_5(patch)
        run(configure(world, workdir, nonfinite="rollback"))
    return workdir


def lose_phase_5(patch, stop_at=None):
    make_collect = ppo.online.make_collect

    def made(*arguments):
        collect = make_collect(*arguments)

        def collected(params, phase, *turn):
            if phase == stop_at:
                raise KeyboardInterrupt
            found = collect(params, phase, *turn)
            return lose_scores(found) if phase == 5 else found

        return collected

    patch.setattr(ppo.online, "make_collect", made)


def test_rollback_goes_on_without_the_phase(rolled_back, straight):
    rows, others = metrics_of(rolled_back), metrics_of(straight)
    assert [row["phase"] for row in rows] == list(range(PHASES + 1))
    assert rows[:5] == others[:5]
    assert rows[5] == {"phase": 5, "nonfinite/left_out": 1.0}
    # Phase 6 has its own prompts, and the weights of phase 4.
    said, other = (
        [row["prompt"] for row in run_files.read_responses(folder, 6)]
        for folder in (rolled_back, straight)
    )
    assert said == other
    assert run_files.response_phases(rolled_back) == [0, 1, 2, 3, 4, 6]
    assert rows[6]["reward/mean"] != others[6]["reward/mean"]


@pytest.mark.parametrize("every", [3, 5])
def test_a_rolled_back_run_goes_on_after_a_kill(
    world, run, rolled_back, tmp_path, every
):
    """Killed in phase 6: with phase 5 left out after the checkpoint, or in it."""
    again = functools.partial(
        configure,
        *(world, tmp_path / "run"),
        nonfinite="rollback",
        checkpoint__every=every,
    )
    with pytest.MonkeyPatch.context() as patch:
        lose_phase_5(patch, stop_at=6)
        with pytest.raises(KeyboardInterrupt):
            run(again())
    with pytest.MonkeyPatch.context() as patch:
        lose_phase_5(patch)
        run(again())
    assert_same_run(tmp_path / "run", rolled_back)


def test_a_mesh_of_eight_one_and_eight_again(world, run, tmp_path):
    """Two phases each, at the learning rates of configs/ppo.py; weights within 1e-6."""
    calm = {"optimizer__lr": 3e-4, "optimizer__critic_lr": 1e-3, "checkpoint__every": 1}
    split = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    settings = calm | split
    run(configure(world, tmp_path / "eight", **settings), devices=8)
    workdir = tmp_path / "both"
    for last, devices in ((2, 8), (4, 1), (6, 8)):
        forget_after(workdir, last - 2)
        changes = settings if devices == 8 else calm
        run(configure(world, workdir, **changes), devices=devices)
    for row, other in zip(metrics_of(workdir), metrics_of(tmp_path / "eight")):
        assert row == pytest.approx(other, rel=0, abs=1e-4)
    weights, want = (
        load_file(folder / "export" / "model.safetensors")
        for folder in (workdir, tmp_path / "eight")
    )
    far = {name: np.abs(weights[name] - want[name]).max() for name in want}
    assert max(far.values()) < 1e-6, json.dumps({k: float(x) for k, x in far.items()})


def forget_after(workdir, phase):
    """What a run would be that had ended after this phase."""
    for saved in checkpoint.saved_phases(workdir / "checkpoints"):
        if saved > phase:
            shutil.rmtree(workdir / "checkpoints" / str(saved))

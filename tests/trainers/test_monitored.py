"""Runs that their monitor ends: by a bound on the KL that any training passes."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import checkpoint, run_files
from tests.trainers.runs import metrics_of

# Three phases are the baseline; the fourth is the first that can be beyond a bound.
SEEN = 4


def monitored(world, workdir, action):
    return world.ppo_config(
        workdir,
        total_phases=9,
        evaluate_every=9,
        checkpoint__every=1,
        monitor__action=action,
        monitor__kl=1e-6,
        monitor__patience=1,
    )


def alerts_of(workdir):
    lines = (workdir / "alerts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def exported(workdir):
    return load_file(workdir / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def stopped(world, run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("monitored") / "stopped"
    run(monitored(world, workdir, "stop"))
    return workdir


def test_a_stopped_run_is_whole(stopped, run, world, capfd):
    """It ends with the phase of the alarm, which is evaluated, saved and exported."""
    alerts = alerts_of(stopped)
    assert "kl" in [alert["rule"] for alert in alerts]
    assert {alert["phase"] for alert in alerts} == {SEEN}
    rows = metrics_of(stopped)
    assert rows[-1]["phase"] == SEEN and "heldout/reward_mean" in rows[-1]
    assert checkpoint.saved_phases(stopped / "checkpoints")[-1] == SEEN
    assert (stopped / "export" / "config.json").exists()
    before = exported(stopped)
    # The same command again changes nothing.
    run(monitored(world, stopped, "stop"))
    assert "--config.monitor.action=warn" in capfd.readouterr().out
    assert metrics_of(stopped) == rows
    for name, tensor in exported(stopped).items():
        np.testing.assert_array_equal(tensor, before[name])


def test_a_stopped_run_goes_on_when_told(stopped, run, world):
    run(monitored(world, stopped, "warn"))
    assert metrics_of(stopped)[-1]["phase"] == 9
    assert alerts_of(stopped)[0]["phase"] == SEEN


def test_a_run_is_rolled_back(run, world, tmp_path, capfd):
    """What is exported is the last phase saved before the alarm's first."""
    run(monitored(world, tmp_path / "back", "rollback"))
    said = capfd.readouterr().out
    assert f"rolled back to phase {SEEN - 1}" in said
    assert "ALERT at phase 4, kl" in said and "what to do" in said
    other = monitored(world, tmp_path / "short", "off")
    other.total_phases = SEEN - 1
    other.evaluate_every = 0
    run(other)
    assert not run_files.RunFiles(tmp_path / "short").alerts.exists()
    found, want = exported(tmp_path / "back"), exported(tmp_path / "short")
    for name, tensor in want.items():
        np.testing.assert_array_equal(found[name], tensor)
    # The closing summary is about that phase, not about the last one.
    assert f"phase {SEEN - 1}, to which the run was rolled back" in said
    summary = json.loads((tmp_path / "back" / "summary.json").read_text("utf-8"))
    assert summary["phases"] == SEEN and summary["exported"] == SEEN - 1
    first, *_, last = metrics_of(tmp_path / "short")
    for key in ("heldout/reward_mean", "heldout/kl"):
        assert summary[key] == {"before": first[key], "after": last[key]}
    # Going on all the same, it is about the last one again.
    run(monitored(world, tmp_path / "back", "warn"))
    summary = json.loads((tmp_path / "back" / "summary.json").read_text("utf-8"))
    assert summary["phases"] == 9 and "exported" not in summary

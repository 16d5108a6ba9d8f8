"""What the tests of whole runs share: how one is started, and when two are the same."""

import json
import pathlib
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[2]


def metrics_of(workdir):
    """metrics.jsonl as it was written, line by line, without what a clock says."""
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in lines
    ]


def assert_same_run(workdir, other):
    """Same metrics, responses and sample texts, and the same weights bit for bit."""
    assert metrics_of(workdir) == metrics_of(other)
    mine, others = (
        {p.name: p.read_bytes() for p in (folder / "responses").glob("*")}
        for folder in (workdir, other)
    )
    assert mine == others
    alarms = [
        path.read_text("utf-8") if path.exists() else ""
        for path in (workdir / "alerts.jsonl", other / "alerts.jsonl")
    ]
    assert alarms[0] == alarms[1]
    samples = [folder / "samples.md" for folder in (workdir, other)]
    if any(path.exists() for path in samples):
        assert samples[0].read_text("utf-8") == samples[1].read_text("utf-8")
    weights, expected = (
        load_file(folder / "export" / "model.safetensors")
        for folder in (workdir, other)
    )
    assert weights.keys() == expected.keys()
    for name in weights:
        np.testing.assert_array_equal(weights[name], expected[name], err_msg=name)


def assert_close_runs(workdir, other, but=()):
    """Every metric within 1e-4, but for some (phase, name)."""
    for row, expected in zip(metrics_of(workdir), metrics_of(other), strict=True):
        assert row.keys() == expected.keys()
        for key in row:
            if (row["phase"], key) in but:
                continue
            np.testing.assert_allclose(
                row[key], expected[key], rtol=0, atol=1e-4, err_msg=key
            )


def assert_same_training(workdir, other):
    """Every metric and every weight within 1e-4."""
    assert_close_runs(workdir, other)
    weights, others = (
        load_file(folder / "export" / "model.safetensors")
        for folder in (workdir, other)
    )
    assert weights.keys() == others.keys()
    for name in weights:
        np.testing.assert_allclose(weights[name], others[name], rtol=0, atol=1e-4)


def command(world, algorithm, workdir):
    """The command line of a run in the tiny world."""
    settings = world.settings(algorithm) | {"workdir": str(workdir)}
    return [
        *(sys.executable, "-m", "rlhf_jax.train", f"--config=configs/{algorithm}.py"),
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def start(world, algorithm, workdir, env):
    """Runs it to its end, in a process of its own."""
    return subprocess.run(
        command(world, algorithm, workdir),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

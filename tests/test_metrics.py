"""The writers: metrics.jsonl, TensorBoard, and W&B through a stand-in module."""

import math
import sys
import types

import jax.numpy as jnp
import pytest

from rlhf_jax import metrics, run_files
from rlhf_jax.errors import UserError


@pytest.fixture
def files(tmp_path):
    return run_files.open_run(tmp_path / "run", {})


def test_jsonl_is_always_written(files):
    writers = metrics.open_writers(files)
    writers.write(1, {"reward/mean": jnp.float32(0.5), "time/phase_s": 1.5})
    # Flushed line by line: readable before close.
    assert run_files.read_metrics(files.workdir) == [
        {"phase": 1, "reward/mean": 0.5, "time/phase_s": 1.5}
    ]
    writers.close()


def test_equal_metrics_give_equal_bytes(tmp_path):
    texts = []
    for name in ("a", "b"):
        files = run_files.open_run(tmp_path / name, {})
        writers = metrics.open_writers(files)
        for phase in range(1, 5):
            writers.write(phase, {"x": jnp.sin(jnp.float32(phase)), "n": phase})
        writers.close()
        texts.append(files.metrics.read_bytes())
    assert texts[0] == texts[1]


def test_tensorboard_goes_on_after_a_restart(files):
    pytest.importorskip("tensorboardX")
    for first in (1, 3):
        writers = metrics.open_writers(files, tensorboard=True, first_phase=first)
        for phase in range(first, 5):
            writers.write(phase, {"reward/mean": 0.5, "nan": math.nan})
        writers.close()
    events = list((files.workdir / "tensorboard").iterdir())
    assert len(events) == 2
    assert all(b"reward/mean" in path.read_bytes() for path in events)


@pytest.mark.parametrize("package", ["tensorboardX", "wandb"])
def test_missing_package_names_the_extra(files, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    flags = {"tensorboardX": {"tensorboard": True}, "wandb": {"wandb": "offline"}}
    extra = {"tensorboardX": "tensorboard", "wandb": "wandb"}[package]
    with pytest.raises(UserError, match=rf'pip install "rlhf_jax\[{extra}\]"'):
        metrics.open_writers(files, **flags[package])


def test_wandb_goes_on_under_the_same_id(files, monkeypatch):
    started, logged = [], []

    def init(**arguments):
        started.append(arguments)
        return types.SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=logged.append,
            finish=lambda: logged.append("finish"),
        )

    stand_in = types.SimpleNamespace(init=init, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for phase in (1, 2):
        writers = metrics.open_writers(files, wandb="offline", config={"seed": 1})
        writers.write(phase, {"reward/mean": jnp.float32(0.5), "nan": math.nan})
        writers.close()
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["resume"] == "allow"
    assert started[0]["name"] == "run"
    assert started[0]["config"] == {"seed": 1}
    assert logged == [
        {"phase": 1, "reward/mean": 0.5},
        "finish",
        {"phase": 2, "reward/mean": 0.5},
        "finish",
    ]


def test_wandb_that_does_not_start_is_a_sentence(files, monkeypatch):
    def init(**_):
        raise OSError("no API key\nlong story")

    stand_in = types.SimpleNamespace(init=init, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(
        UserError, match=r"did not start \(no API key\); run wandb login"
    ):
        metrics.open_writers(files, wandb="online")


def test_wandb_mode_is_checked(files):
    with pytest.raises(UserError, match="not 'yes'"):
        metrics.open_writers(files, wandb="yes")

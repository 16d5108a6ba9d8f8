"""The reference's log-probabilities: computed once, read again, the same everywhere."""

import io
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rlhf_jax import sharding
from rlhf_jax.trainers import reference

ROWS = {"x": np.arange(14, dtype=np.float32).reshape(7, 2)}
PARAMS = {"final_norm": {"scale": np.array([2.0, 3.0], np.float32)}}


class Asked:
    """A run folder's reference, and how often it was asked."""

    def __init__(self, folder):
        self.folder, self.calls, self.told = folder, 0, io.StringIO()
        self.mesh = sharding.make_mesh(1, 2, 4)

    def score(self, params, rows):
        self.calls += not isinstance(rows["x"], jax.core.Tracer)
        return rows["x"] * params["final_norm"]["scale"][None]

    def __call__(self, params=PARAMS, rows=ROWS, **settings):
        return reference.reference_logprobs(
            self.score,
            jax.tree.map(jnp.asarray, params),
            "train",
            rows,
            folder=self.folder,
            settings=settings,
            batch=4,
            mesh=self.mesh,
            console=Console(file=self.told),
        )


@pytest.fixture
def asked(tmp_path):
    return Asked(tmp_path / "reference")


def test_all_rows_in_batches_then_from_disk(asked):
    expected = ROWS["x"] * np.array([2.0, 3.0], np.float32)
    np.testing.assert_array_equal(asked(), expected)
    assert asked.calls == 2  # 4 rows and 3
    assert "7/7 train rows" in asked.told.getvalue()
    np.testing.assert_array_equal(asked(), expected)
    assert asked.calls == 2
    assert [path.name for path in asked.folder.iterdir()] == ["train.npz"]


@pytest.mark.parametrize("changed", ["weights", "rows", "settings"])
def test_what_it_came_from_has_changed(asked, changed):
    asked()
    if changed == "weights":
        scale = np.nextafter(PARAMS["final_norm"]["scale"], np.float32(9))
        asked(params={"final_norm": {"scale": scale}})
    elif changed == "rows":
        asked(rows={"x": ROWS["x"] + np.float32(1)})
    else:
        asked(ld_alpha=0.5)
    assert asked.calls == 4


def test_a_damaged_file_is_made_again(asked):
    expected = asked()
    path = asked.folder / "train.npz"
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(asked(), expected)
    assert asked.calls == 4


def test_the_fingerprint_is_of_every_bit_and_place_and_the_same_on_a_mesh():
    kernel = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    params = {"layers": {"mlp": {"up": {"kernel": kernel}}}}
    expected = np.asarray(reference.fingerprint(params))
    mesh = sharding.make_mesh(2, 2, 2)
    shardings = sharding.param_shardings(params, mesh)
    cut = jax.tree.map(sharding.to_devices, params, shardings)
    np.testing.assert_array_equal(reference.fingerprint(cut), expected)

    def other(change):
        copy = kernel.copy()
        change(copy)
        found = reference.fingerprint({"layers": {"mlp": {"up": {"kernel": copy}}}})
        return (np.asarray(found) != expected).all()

    def swap(x):
        x[0, [0, 1]] = x[0, [1, 0]]

    def last_bit(x):
        x.view(np.uint32)[1, 7, 7] ^= 1

    assert other(swap) and other(last_bit)


PROCESS = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from rlhf_jax import hosts, progress, sharding
from rlhf_jax.trainers import reference

hosts.join_hosts()
mesh = sharding.make_mesh(1, 2, 1)
folder = pathlib.Path(sys.argv[1]) / str(jax.process_index())
folder.mkdir(exist_ok=True)
score = jax.jit(lambda params, rows: rows * params["scale"])
for _ in range(2):
    found = reference.reference_logprobs(
        score,
        {"scale": sharding.to_devices(np.float32(2.0), sharding.replicated(mesh))},
        "train",
        np.arange(5, dtype=np.float32),
        folder=folder,
        settings={},
        batch=2,
        mesh=mesh,
        console=progress.make_console(),
    )
    assert found.tolist() == [0, 2, 4, 6, 8], found
print(sorted(path.name for path in folder.iterdir()))
"""


def test_two_hosts_without_a_common_disk(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            env=alone | hosts | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, complaints) in zip(processes, outputs):
        assert process.returncode == 0, complaints
    assert "read from" in outputs[0][0] and "['train.npz']" in outputs[0][0]
    assert outputs[1][0].splitlines()[-1] == "[]"

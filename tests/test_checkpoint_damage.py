"""Damage of any file of the newest checkpoint: by one process, and by two."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from rlhf_jax import checkpoint
from tests.processes import spoken

from .test_checkpoint import (
    assert_same,
    fill,
    largest_file,
    make_policy,
    make_train,
    restore,
)

ROOT = pathlib.Path(__file__).parents[1]


def files_of(step):
    return sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoint.close(fill(folder))
    return folder


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_file_cut_short_is_never_read_as_another_state(saved, tmp_path, left):
    """Of each file of a step: it is not needed, or the step before is taken."""
    fallen = set()
    for number, name in enumerate(files_of(saved / "2")):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        path = folder / "2" / name
        os.truncate(path, int(left * path.stat().st_size))
        manager, said = checkpoint.open_checkpoints(folder), []
        restored = restore(manager, said)
        checkpoint.close(manager)
        policy = make_policy(1.0 + restored.phase)
        assert_same(restored.policy, policy)
        assert_same(restored.train, make_train(policy))
        assert restored.meta == {"seen": [restored.phase, 2]}
        assert len(said) == (restored.phase == 1)
        if restored.phase == 1:
            fallen.add(str(name))
    large = largest_file(saved / "2" / "train").relative_to(saved / "2")
    parts = "meta/metadata", "policy/_METADATA", "train/manifest.ocdbt", str(large)
    assert fallen.issuperset(parts)


OF_TWO = """
import sys, jax, jax.numpy as jnp
from rlhf_jax import checkpoint, sharding
from rlhf_jax.hosts import join_hosts
from jax.sharding import NamedSharding, PartitionSpec as P

join_hosts()
folder, do, where = sys.argv[1:]
mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
rows, whole = (NamedSharding(mesh, spec) for spec in (P("fsdp"), P()))
grid = jnp.arange(2048.0).reshape(64, 32)
make = jax.jit(lambda x: {"w": x + grid}, out_shardings=rows)
one = jax.jit(lambda: jnp.int32(1), out_shardings=whole)
total = jax.jit(jnp.sum, out_shardings=whole)
manager = checkpoint.open_checkpoints(folder)
if do == "save":
    for phase in range(3):
        checkpoint.save(manager, phase, policy=make(phase), train={"n": one()}, meta={})
else:
    read = checkpoint._read
    def read_or_fail(manager, phase, *targets):
        if phase == 2 and str(jax.process_index()) == where:
            raise ValueError("this process cannot see the file")
        return read(manager, phase, *targets)
    checkpoint._read = read_or_fail
    found = checkpoint.restore(
        manager,
        policy=checkpoint.abstract(make(0)),
        train=checkpoint.abstract({"n": one()}),
        say=lambda text: jax.process_index() == 0 and print(text),
    )
    print("phase", found.phase, "sum", float(total(found.policy["w"])))
    after = found.phase + 1
    checkpoint.save(manager, after, policy=make(2), train={"n": one()}, meta={})
checkpoint.close(manager)
"""


def two_processes(folder, do, where=""):
    """What both print, without the line of their transport."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OF_TWO, str(folder), do, where],
            cwd=ROOT,
            env=env | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, complaints) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, complaints
    return [spoken(told) for told, _ in outputs]


def cut_the_part_of_process_1(folder):
    for path in (folder / "2" / "policy" / "ocdbt.process_1" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (cut_the_part_of_process_1, ""),
        (lambda folder: None, "0"),
        (lambda folder: None, "1"),
    ],
    ids=["on_disk", "seen_by_0", "seen_by_1"],
)
def test_two_processes_fall_back_together(tmp_path, damage, where):
    """Each has a half of the weights; one that cannot read takes the other along."""
    two_processes(tmp_path, "save")
    damage(tmp_path)
    first, second = two_processes(tmp_path, "restore", where)
    assert "2 cannot be read and was set aside" in first[0]
    assert first[1:] == second == ["phase 1 sum 2098176.0"]  # 2047 · 2048/2 + 2048
    assert checkpoint.saved_phases(tmp_path) == [0, 1, 2]
    assert (tmp_path / "2.unreadable").is_dir()


def test_two_processes_read_what_is_whole(tmp_path):
    two_processes(tmp_path, "save")
    shutil.copytree(tmp_path / "2", tmp_path / "7")
    first, second = two_processes(tmp_path, "restore")
    assert first == second == ["phase 7 sum 2100224.0"]  # 2047 · 2048/2 + 2 · 2048

"""Checkpoints: what is read back, where to, and what a crash leaves behind."""

import functools
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax import checkpoint
from rlhf_jax.errors import UserError


def make_policy(scale=1.0):
    return {
        "embed": {"tokens": scale * jnp.arange(64.0 * 8).reshape(64, 8)},
        "layers": {"scale": jnp.full((2, 8), scale, jnp.bfloat16)},
    }


def make_train(policy):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "opt": tx.init(policy),
        "key": jax.random.key(3),
        "row_keys": jax.random.split(jax.random.key(4), 3),
        "phase": 7,
        "kl_coefficient": 0.2,
        "count": jnp.int32(5),
        "nothing": None,
    }


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        if hasattr(b, "dtype") and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def fill(directory, phases=(0, 1, 2), **options):
    """Saves phases whose policy is scaled by 1 + phase; returns the open manager."""
    manager = checkpoint.open_checkpoints(directory, **options)
    for phase in phases:
        policy = make_policy(1.0 + phase)
        train = make_train(policy)
        checkpoint.save(
            manager, phase, policy=policy, train=train, meta={"seen": [phase, 2]}
        )
    checkpoint.wait(manager)
    return manager


def restore(manager, said=None):
    policy = make_policy()
    return checkpoint.restore(
        manager,
        policy=checkpoint.abstract(policy),
        train=checkpoint.abstract(make_train(policy)),
        say=(said if said is not None else []).append,
    )


def test_round_trip(tmp_path):
    manager = fill(tmp_path / "deep" / "checkpoints")
    assert checkpoint.latest_phase(manager) == 2
    restored = restore(manager)
    policy = make_policy(3.0)
    assert restored.phase == 2
    assert restored.meta == {"seen": [2, 2]}
    assert_same(restored.policy, policy)
    assert_same(restored.train, make_train(policy))
    checkpoint.close(manager)


def test_restored_key_draws_the_same_numbers(tmp_path):
    manager = fill(tmp_path, phases=[0])
    key = restore(manager).train["key"]
    checkpoint.close(manager)
    np.testing.assert_array_equal(
        jax.random.normal(key, (4,)), jax.random.normal(jax.random.key(3), (4,))
    )


def test_nothing_saved_is_none(tmp_path):
    manager = checkpoint.open_checkpoints(tmp_path)
    assert checkpoint.latest_phase(manager) is None
    assert restore(manager) is None
    checkpoint.close(manager)


def test_a_phase_is_saved_once(tmp_path):
    manager = fill(tmp_path, phases=[4])
    with pytest.raises(ValueError, match="phase 4 is already saved"):
        checkpoint.save(manager, 4, policy=make_policy(), train={"n": 1}, meta={})
    checkpoint.close(manager)


def test_keep_the_newest_and_every_nth(tmp_path):
    checkpoint.close(fill(tmp_path, phases=range(7), keep=2, keep_every=4))
    assert checkpoint.saved_phases(tmp_path) == [0, 4, 5, 6]


def test_policy_alone(tmp_path):
    checkpoint.close(fill(tmp_path))
    target = checkpoint.abstract(make_policy())
    shutil.rmtree(tmp_path / "1" / "train")
    assert_same(checkpoint.restore_policy(tmp_path, 1, target), make_policy(2.0))
    assert_same(checkpoint.restore_policy(tmp_path, None, target), make_policy(3.0))


def test_policy_alone_refuses_in_a_sentence(tmp_path):
    target = checkpoint.abstract(make_policy())
    with pytest.raises(UserError, match="no checkpoints in"):
        checkpoint.restore_policy(tmp_path / "none", None, target)
    checkpoint.close(fill(tmp_path))
    with pytest.raises(UserError, match=r"no checkpoint of phase 9; saved .* 0, 1, 2"):
        checkpoint.restore_policy(tmp_path, 9, target)
    target["embed"]["tokens"] = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    with pytest.raises(UserError, match="cannot be read into this model"):
        checkpoint.restore_policy(tmp_path, 2, target)


def test_restores_on_another_mesh_and_back(tmp_path):
    def mesh_shardings(count):
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:count]), ("fsdp",), axis_types=(AxisType.Auto,)
        )
        rows = NamedSharding(mesh, PartitionSpec("fsdp"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        return {"embed": {"tokens": rows}, "layers": {"scale": everywhere}}, everywhere

    policy, train = make_policy(), {"key": jax.random.key(1), "moment": jnp.ones(8)}
    for step, count in enumerate([1, 8, 1]):
        shardings, everywhere = mesh_shardings(count)
        manager = checkpoint.open_checkpoints(tmp_path)
        targets = {
            "policy": checkpoint.abstract(policy, shardings),
            "train": checkpoint.abstract(train, everywhere),
        }
        if step:
            restored = checkpoint.restore(manager, **targets)
            for leaf, sharding in zip(
                jax.tree.leaves(restored.policy), jax.tree.leaves(shardings)
            ):
                assert leaf.sharding == sharding
            assert len(restored.train["key"].devices()) == count
            assert_same(restored.policy, policy)
            assert_same(restored.train, train)
        checkpoint.save(
            manager,
            step,
            policy=jax.device_put(policy, shardings),
            train=jax.device_put(train, everywhere),
            meta={},
        )
        checkpoint.close(manager)


@pytest.mark.parametrize("count", [1, 8])
def test_arrays_may_be_donated_right_after_save(tmp_path, count):
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,)
    )
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(x):
        return x * 0 - 1

    weights = jax.device_put(jnp.arange(4_000_000, dtype=jnp.float32), sharding)
    counts = np.arange(1_000_000)
    target = checkpoint.abstract({"weights": weights})
    manager = checkpoint.open_checkpoints(tmp_path)
    checkpoint.save(
        manager, 0, policy={"weights": weights}, train={"counts": counts}, meta={}
    )
    for _ in range(4):  # on CPU Orbax holds views of the buffers, not copies
        weights = overwrite(weights)
    counts[:] = -1
    jax.block_until_ready(weights)
    checkpoint.close(manager)
    restored = checkpoint.restore_policy(tmp_path, 0, target)
    np.testing.assert_array_equal(restored["weights"], np.arange(4_000_000))
    manager = checkpoint.open_checkpoints(tmp_path)
    again = checkpoint.restore(
        manager, policy=target, train=checkpoint.abstract({"counts": counts})
    )
    checkpoint.close(manager)
    np.testing.assert_array_equal(again.train["counts"], np.arange(1_000_000))


def largest_file(folder):
    return max(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


def cut_weights(step):
    path = largest_file(step / "policy")
    os.truncate(path, path.stat().st_size // 2)


def zero_optimizer(step):
    path = largest_file(step / "train")
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path.write_bytes(data)


def lose_meta(step):
    shutil.rmtree(step / "meta")


def lose_key_types(step):
    (step / "train" / "array_metadatas" / "process_0").unlink()


@pytest.mark.parametrize(
    "damage", [cut_weights, zero_optimizer, lose_meta, lose_key_types]
)
def test_damaged_newest_falls_back(tmp_path, capfd, damage):
    checkpoint.close(fill(tmp_path))
    damage(tmp_path / "2")
    manager, said = checkpoint.open_checkpoints(tmp_path), []
    restored = restore(manager, said)
    assert restored.phase == 1
    assert_same(restored.policy, make_policy(2.0))
    assert len(said) == 1
    assert "2 cannot be read" in said[0]
    assert "going on from phase 1" in said[0]
    # The run comes to phase 2 again, and saves it.
    policy = make_policy(9.0)
    checkpoint.save(manager, 2, policy=policy, train=make_train(policy), meta={})
    checkpoint.wait(manager)
    assert_same(restore(manager).policy, policy)
    checkpoint.close(manager)
    assert (tmp_path / "2.unreadable").is_dir()
    assert capfd.readouterr() == ("", "")


def test_all_damaged_is_a_sentence(tmp_path):
    checkpoint.close(fill(tmp_path, phases=[0, 1]))
    for phase in "01":
        cut_weights(tmp_path / phase)
    manager = checkpoint.open_checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read .*phase 1"):
        restore(manager)
    assert checkpoint.saved_phases(tmp_path) == [0, 1]
    checkpoint.close(manager)


KILLED_IN_A_SAVE = """
import sys, threading
import jax.numpy as jnp
from rlhf_jax import checkpoint
manager = checkpoint.open_checkpoints(sys.argv[1])
big = {"w": jnp.arange(30_000_000.0)}
checkpoint.save(manager, 0, policy={"w": big["w"][:8]}, train={"n": 1}, meta={})
checkpoint.wait(manager)
checkpoint.save(manager, 1, policy=big, train={"n": 1}, meta={})
print("saving", flush=True)
threading.Event().wait()
"""


def test_killed_in_a_save(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_IN_A_SAVE, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert process.stdout.readline() == b"saving\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any("tmp" in path.name for path in tmp_path.iterdir())
    assert checkpoint.saved_phases(tmp_path) == [0]
    manager = checkpoint.open_checkpoints(tmp_path)
    target = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
    restored = checkpoint.restore(manager, policy=target, train={"n": 1})
    assert restored.phase == 0
    # Another phase than the lost one: Orbax cleans up a phase it saves anyway.
    checkpoint.save(manager, 2, policy=restored.policy, train={"n": 1}, meta={})
    checkpoint.close(manager)
    assert checkpoint.saved_phases(tmp_path) == [0, 2]
    assert not any("tmp" in path.name for path in tmp_path.iterdir())


def test_a_file_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(UserError, match="cannot make the checkpoint folder"):
            checkpoint.open_checkpoints(path)


def test_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="not writable"):
        checkpoint.open_checkpoints(tmp_path)


def test_lost_folder_is_a_sentence(tmp_path):
    manager = fill(tmp_path / "checkpoints", phases=[0])
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="cannot write a checkpoint"):
        checkpoint.save(manager, 1, policy=make_policy(), train={"n": 1}, meta={})
        checkpoint.wait(manager)


def test_orbax_is_silent_and_others_are_not(tmp_path, capfd, caplog):
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.INFO)  # as under absl's app.run
    try:
        manager = fill(tmp_path)
        restore(manager)
        checkpoint.close(manager)
        assert capfd.readouterr() == ("", "")
        assert not caplog.records
        absl.warning("from elsewhere")
        assert caplog.messages == ["from elsewhere"]
    finally:
        absl.setLevel(level)


def test_orbax_is_imported_only_when_used():
    code = "import sys, rlhf_jax.checkpoint; print('orbax.checkpoint' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown == "False\n"


def test_meta_that_is_not_json_raises_at_once(tmp_path):
    manager = checkpoint.open_checkpoints(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(
            manager, 0, policy=make_policy(), train={"n": 1}, meta={"x": object()}
        )
    checkpoint.close(manager)

import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.transformer import make_model

FAMILIES = sorted((pathlib.Path(__file__).parent / "fixtures" / "families").iterdir())


def abstract_params(folder, head):
    hf_config = json.loads((folder / "config.json").read_text())
    model = make_model(config_from_hf(hf_config))
    return jax.eval_shape(lambda key: model.init(key, head=head), jax.random.key(0))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def tiny_params():
    """A tree with the paths of a model, its shapes chosen by hand."""
    return {
        "embed": {"tokens": np.ones((10, 4), np.float32)},
        "layers": {
            "attention_norm": {"scale": np.ones((3, 4), np.float32)},
            "attention": {"query": {"kernel": np.ones((3, 4, 6), np.float32)}},
            "mlp": {"down": {"kernel": np.ones((3, 5, 4), np.float32)}},
        },
        "final_norm": {"scale": np.ones((4,), np.float32)},
    }


# The table.


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("folder", FAMILIES, ids=lambda folder: folder.name)
def test_each_leaf_of_each_family_matches_one_rule(folder, head, mesh):
    """Counted here, for `logical_axes` would only say so by raising."""
    params = abstract_params(folder, head)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        hits = [axes for rule, axes in sharding.RULES if re.fullmatch(rule, name)]
        assert len(hits) == 1, (name, hits)
        assert len(hits[0]) == leaf.ndim, (name, leaf.shape, hits[0])
        assert sharding.logical_axes(f"policy/{name}") == hits[0]
    shardings = sharding.param_shardings(params, mesh)
    jax.tree.map(lambda leaf, cut: cut.shard_shape(leaf.shape), params, shardings)


@pytest.mark.parametrize(
    "path",
    [
        "layers/attention/query/lora",
        "embed/tokens/extra",
        "norm/scale",
        "pre_embed/tokens",
        "layers/mlp/router/kernel",
        "kernel",
    ],
)
def test_an_unknown_leaf_is_an_error(path):
    with pytest.raises(ValueError, match=f"'{path}' matches 0 rows"):
        sharding.logical_axes(path)


def test_a_leaf_that_two_rules_match_is_an_error(monkeypatch):
    twice = (*sharding.RULES, (r".*/tokens", (None, None)))
    monkeypatch.setattr(sharding, "RULES", twice)
    with pytest.raises(ValueError, match="'embed/tokens' matches 2 rows"):
        sharding.logical_axes("embed/tokens")


def test_a_leaf_of_another_rank_is_an_error(mesh):
    params = {"embed": {"tokens": np.ones((4,), np.float32)}}
    with pytest.raises(ValueError, match=r"has shape \(4,\), expected .*vocab"):
        sharding.param_shardings(params, mesh)


def test_specs_worked_by_hand(mesh):
    """Tokens [10, 4]: 10 over tensor=2, 4 over fsdp=2; down [3, 5, 4]: 5 % 2 = 1."""
    found = sharding.param_shardings({"policy": tiny_params()}, mesh)["policy"]
    assert found["embed"]["tokens"].spec == P("tensor", "fsdp")
    assert found["layers"]["attention_norm"]["scale"].spec == P(None, None)
    query = found["layers"]["attention"]["query"]["kernel"]
    assert query.spec == P(None, "fsdp", "tensor")
    assert query.shard_shape((3, 4, 6)) == (3, 2, 3)
    assert found["layers"]["mlp"]["down"]["kernel"].spec == P(None, None, "fsdp")


def test_the_plan_says_what_stays_whole(mesh):
    rows = {row.path: row for row in sharding.plan(tiny_params(), mesh)}
    down = rows["layers/mlp/down/kernel"]
    assert down.spec == "-, whole (5 % tensor=2), fsdp"
    assert down.shape == (3, 5, 4)
    assert down.bytes_per_device == 4 * 3 * 5 * 2
    assert rows["embed/tokens"].spec == "tensor, fsdp"
    assert rows["embed/tokens"].bytes_per_device == 4 * 5 * 2
    assert rows["final_norm/scale"].spec == "-"


def test_the_plan_of_axes_of_size_one_is_silent():
    rows = sharding.plan(tiny_params(), sharding.make_mesh())
    assert {word for row in rows for word in row.spec.split(", ")} == {"-"}


# The mesh.


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_mesh_sizes(sizes, want):
    mesh = sharding.make_mesh(**sizes)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == want
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 x fsdp=1 x tensor=1 does not fit 8 device"),
        ({"tensor": 3}, "must multiply to 8"),
        ({"data": 16}, "does not fit"),
        ({"data": 4}, "does not fit"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"fsdp": 0}, "every axis is at least 1"),
        ({"fsdp": -2}, "every axis is at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "tpu"
    device_kind: str = "made up"
    core_on_chip: int = 0

    @property
    def coords(self):
        return self.id % 2, self.id // 2 % 2, self.slice_index or 0


def pod(slices, each, platform="tpu", seed=0):
    """Devices of several slices, two to a process, in any order."""
    made = [
        Device(i, i // 2, i // each, platform=platform) for i in range(slices * each)
    ]
    return [made[i] for i in np.random.default_rng(seed).permutation(len(made))]


def gpus(hosts, each):
    """Devices whose slice nobody knows, one process a host."""
    return [Device(i, i // each, platform="gpu") for i in range(hosts * each)]


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ((-1, 4, 1), (2, 4, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((8, 1, 1), (8, 1, 1)),
        ((4, 2, 1), (4, 2, 1)),
    ],
)
def test_only_the_data_axis_goes_over_slices(sizes, want):
    """Two slices of four: places along fsdp and tensor share a slice."""
    mesh = sharding.make_mesh(*sizes, devices=pod(2, 4))
    assert mesh.devices.shape == want
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    of_row = [{d.slice_index for d in row.flat} for row in mesh.devices]
    assert all(len(found) == 1 for found in of_row)
    half = len(of_row) // 2
    assert of_row == [{0}] * half + [{1}] * half


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (3, 2, 2)])
def test_fsdp_stays_inside_a_slice(sizes):
    devices = pod(2, 4) if math.prod(sizes) == 8 else pod(2, 6)
    told = "data={} x fsdp={} x tensor={}".format(*sizes)
    with pytest.raises(UserError) as error:
        sharding.make_mesh(*sizes, devices=devices)
    each = len(devices) // 2
    assert str(error.value) == (
        f"mesh {told} does not fit 2 slices or hosts of {each} devices: fsdp and "
        "tensor must stay inside one, so take data a multiple of 2 and fsdp x tensor "
        f"a divisor of {each}; change config.mesh"
    )


def test_slices_of_unequal_size():
    devices = pod(2, 4)
    devices = [d for d in devices if d.id != 7] + [Device(8, 4, 0)]
    with pytest.raises(UserError, match=r"the 2 slices or hosts have 5, 3 devices"):
        sharding.make_mesh(devices=devices)


def test_hosts_with_gpus_are_slices_that_fsdp_may_leave():
    inside = sharding.make_mesh(2, 4, 1, devices=gpus(2, 4)).devices
    assert [[d.process_index for d in row.flat] for row in inside] == [[0] * 4, [1] * 4]
    across = sharding.make_mesh(1, 4, 2, devices=gpus(2, 4)).devices
    # Each pair along tensor is on one host.
    assert [[d.process_index for d in pair] for pair in across[0]] == [
        *([[0, 0]] * 2),
        *([[1, 1]] * 2),
    ]
    with pytest.raises(UserError, match=r"2 slices or hosts of 4 .*: tensor must stay"):
        sharding.make_mesh(1, 1, 8, devices=gpus(2, 4))


def test_one_gpu_a_process_says_nothing_of_hosts():
    mesh = sharding.make_mesh(1, 1, 8, devices=gpus(8, 1))
    assert [d.id for d in mesh.devices.flat] == list(range(8))


def test_processes_of_cpus_are_no_slices():
    devices = [dataclasses.replace(d, platform="cpu") for d in gpus(2, 4)]
    assert sharding.make_mesh(1, 1, 8, devices=devices).devices.shape == (1, 1, 8)


def test_a_batch_that_does_not_divide(mesh):
    sharding.check_batch("config.rollout.prompts", 12, mesh)
    with pytest.raises(UserError) as error:
        sharding.check_batch("config.rollout.prompts", 10, mesh)
    assert str(error.value) == (
        "config.rollout.prompts=10 does not divide over the 4 rows of the mesh "
        "(data=2 x fsdp=2); take a multiple of 4 or change config.mesh"
    )


# Optimizer state.


def optimizers():
    """Plain, and one for each network as in PPO."""
    adam = lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(
            learning_rate=optax.linear_schedule(1.0, 0.0, 10)
        ),
    )
    labels = {"policy": "a", "critic": "b"}
    return {
        "adam": adam(),
        "multi": optax.multi_transform({"a": adam(), "b": adam()}, labels),
    }


@pytest.mark.parametrize("name", ["adam", "multi"])
def test_moments_lie_as_their_parameters_do(name, mesh):
    optimizer = optimizers()[name]
    host = {"policy": tiny_params(), "critic": tiny_params()}
    shardings = sharding.param_shardings(host, mesh)
    params = jax.tree.map(sharding.to_devices, host, shardings)
    init = jax.jit(
        optimizer.init,
        out_shardings=sharding.optimizer_shardings(optimizer, params, mesh),
    )
    state = init(params)
    moments = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if any(getattr(key, "name", "") in ("mu", "nu") for key in path)
    ]
    # Two moments of each weight of the two networks, and none twice.
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    by_path = dict(jax.tree_util.tree_leaves_with_path(shardings))
    for path, leaf in moments:
        want = _lookup(by_path, path)
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim), (path, leaf.sharding)
    seen = {id(leaf) for _, leaf in moments}
    rest = [leaf for leaf in jax.tree.leaves(state) if id(leaf) not in seen]
    assert rest and all(leaf.sharding.is_fully_replicated for leaf in rest)


def _lookup(by_path, path):
    """The sharding of the weight whose path ends the moment's."""
    names = sharding.path_string(path)
    (found,) = [
        value
        for key, value in by_path.items()
        if names.endswith("/" + sharding.path_string(key))
    ]
    return found


# Arrays.


def test_constrain_needs_no_mesh(mesh):
    x = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(sharding.constrain(x, sharding.BATCH, None), x)
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda x: sharding.constrain(x, sharding.BATCH, None))(x)
    assert placed.sharding.shard_shape(placed.shape) == (1, 2)


def test_to_devices_and_back(mesh):
    tree = {"a": np.arange(12.0).reshape(4, 3), "b": np.float32(2.0)}
    a = sharding.to_devices(tree["a"], sharding.rows(mesh))
    b = sharding.to_devices(tree["b"], sharding.replicated(mesh))
    assert a.sharding.shard_shape(a.shape) == (1, 3)
    assert b.sharding.is_fully_replicated
    back = sharding.to_host({"a": a, "b": b})
    jax.tree.map(np.testing.assert_array_equal, back, tree)

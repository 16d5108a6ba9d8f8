import os
import re

import jax
import pytest

from rlhf_jax import preflight, sharding
from tests.preflight.test_needs import config_of, mesh_of

BIG = {"sequence_tokens": 96, "learning__batch": 64}


def needed(config, mesh):
    return preflight.estimate(config, mesh).total


def follow(config, sentence):
    """The config with the flags of the sentence."""
    flags = dict(re.findall(r"--config\.([\w.]+)=(\w+)", sentence))
    kinds = {"True": True, "bfloat16": "bfloat16"}
    given = {k: kinds[v] if v in kinds else int(v) for k, v in flags.items()}
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(given)
    return changed, given


def test_a_run_that_fits_needs_no_advice():
    config = config_of("dpo", **BIG)
    assert preflight.advise(config, mesh_of(), needed(config, mesh_of())) is None


@pytest.mark.parametrize(
    ("algorithm", "mesh", "share", "changes", "want"),
    [
        ("dpo", mesh_of(), 0.9, {"model__vocab_size": 8192}, ["logprob_chunk"]),
        ("reward_model", mesh_of(), 0.7, {}, ["learning.accumulation"]),
        (
            *("sft", mesh_of(data=8), 0.45),
            {"model__num_hidden_layers": 24, "learning__batch": 8},
            ["mesh.fsdp"],
        ),
    ],
)
def test_the_advice_is_enough(algorithm, mesh, share, changes, want):
    config = config_of(algorithm, remat=True, **BIG | changes)
    available = int(share * needed(config, mesh))
    sentence = preflight.advise(config, mesh, available)
    changed, given = follow(config, sentence)
    assert list(given) == want
    fsdp = given.get("mesh.fsdp", 1)
    sizes = {"data": mesh.shape["data"] // fsdp, "fsdp": fsdp}
    assert needed(changed, mesh_of(**sizes)) <= 0.9 * available


def test_recomputing_is_named_where_it_is_off():
    config = config_of("reward_model", remat=False, **BIG)
    sentence = preflight.advise(config, mesh_of(), needed(config, mesh_of()) // 2)
    assert "give --config.remat=True, with which it is" in sentence


def test_what_does_not_divide_is_not_advised():
    """13 pairs: they cannot be cut into micro-batches."""
    config = config_of("reward_model", sequence_tokens=96, learning__batch=13)
    share = int(0.8 * needed(config, mesh_of()))
    assert "accumulation" not in preflight.advise(config, mesh_of(), share)


def test_when_nothing_is_enough():
    config = config_of("dpo", **BIG)
    sentence = preflight.advise(config, mesh_of(), 1000)
    assert "no one or two settings are enough" in sentence
    assert "take more devices and a larger config.mesh.fsdp" in sentence


def test_the_devices_of_a_cpu_share_its_memory():
    mesh = sharding.make_mesh()
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert len(jax.devices()) == 8
    assert 0 < preflight.capacity(mesh) <= whole / 8


def test_the_lines_add_up():
    config, mesh = config_of("grpo"), sharding.make_mesh()
    available = preflight.capacity(mesh)
    ((name, told), *kinds), advice = preflight.rows(config, mesh, available)
    total = needed(config, mesh)
    assert name == "memory" and advice is None
    assert told.startswith(f"{total / 1e6:,.1f} MB a device of ")
    sizes = [float(size.removesuffix(" MB").replace(",", "")) for _, size in kinds]
    assert sum(sizes) == pytest.approx(total / 1e6, abs=0.06 * len(sizes))

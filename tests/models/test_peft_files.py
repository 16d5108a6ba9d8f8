import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.layers import LINEARS
from rlhf_jax.models.peft_files import load_adapter, save_adapter
from rlhf_jax.models.pretrained import save_pretrained
from rlhf_jax.trees import join
from tests.models.conftest import FAMILIES, jitted, load_fixture

PEFT = pathlib.Path(__file__).parents[1] / "fixtures" / "peft"
NAMES = sorted(folder.name for folder in FAMILIES.iterdir())
FUSED = [name for name in NAMES if name.startswith("gpt")]


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def load(folder, name, **settings):
    pretrained = load_fixture(name).pretrained
    return load_adapter(folder, pretrained.config, pretrained.hf_config, **settings)


def random_adapter(name, targets=LINEARS, rank=3):
    """An adapter whose B is random too, and the linear layers that it is on."""
    params = load_fixture(name).pretrained.params
    linears = {**params["layers"]["attention"], **params["layers"]["mlp"]}
    targets = [linear for linear in targets if linear in linears]
    fresh = lora.init_adapter(params, jax.random.key(1), rank=rank, targets=targets)
    rng = np.random.default_rng(2)
    draw = lambda x: np.asarray(x) + rng.normal(0, 0.3, x.shape).astype(np.float32)
    return jax.tree.map(draw, fresh), targets


def save(folder, name, adapter, targets, **settings):
    pretrained = load_fixture(name).pretrained
    settings = {"rank": 3, "alpha": 5, "dropout": 0.1, "base_model": "base"} | settings
    config, hf_config = pretrained.config, pretrained.hf_config
    save_adapter(folder, adapter, config, hf_config, targets=targets, **settings)


@pytest.fixture
def spoiled(tmp_path):
    """Copy an adapter of PEFT's, changing its tensors or its settings."""

    def copy(name, tensors=lambda tensors: tensors, **settings):
        folder = tmp_path / "spoiled"
        shutil.copytree(PEFT / name, folder)
        path = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return copy


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_those_of_peft(name):
    fixture = load_fixture(name)
    found = load(PEFT / name, name)
    scale = found.alpha / found.rank
    model = jitted(dataclasses.replace(fixture.pretrained.config, lora_scale=scale))
    tokens, mask = fixture.arrays["tokens"][0], fixture.arrays["mask"][0]
    params = fixture.pretrained.params | {
        key: found.adapter[key] for key in found.adapter if key == "score"
    }
    both = join(params, {"layers": found.adapter["layers"]})
    hidden = model.apply(both, tokens, mask)
    with np.load(PEFT / name / "logits.npz") as arrays:
        want = dict(arrays)
    if "scores" in want:
        got = np.asarray(model.score(params, hidden))[:, -1]
        np.testing.assert_allclose(got, want["scores"], atol=1e-4)
    else:
        got, real = np.asarray(model.unembed(params, hidden)), mask.astype(bool)
        np.testing.assert_allclose(got[real], want["logits"][real], atol=1e-4)


@pytest.mark.parametrize("targets", [LINEARS, ("query", "value"), ("key", "up")])
@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_is_bit_equal(name, targets, tmp_path):
    adapter, targets = random_adapter(name, targets)
    save(tmp_path, name, adapter, targets)
    found = load(tmp_path, name)
    assert_equal_trees(found.adapter, adapter)
    leaves = jax.tree.leaves(found.adapter)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    assert (found.rank, found.dropout, found.base_model) == (3, 0.1, "base")
    assert found.alpha == pytest.approx(5, rel=1e-12)
    assert list(found.targets) == targets


@pytest.mark.parametrize("name", [*FUSED, "llama"])
def test_a_fresh_adapter_comes_back_whole(name, tmp_path):
    """B is zero: what A belongs to is not to be seen in the numbers."""
    params = load_fixture(name).pretrained.params
    settings = {"rank": 3, "targets": ("query", "value")}
    fresh = lora.init_adapter(params, jax.random.key(1), **settings)
    save(tmp_path, name, fresh, ("query", "value"))
    assert_equal_trees(load(tmp_path, name).adapter, fresh)


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_wrote_is_kept_when_saved_again(name, tmp_path):
    """Unlike ranks, unlike scales, some layers only, a head."""
    first = load(PEFT / name, name)
    settings = first._asdict()
    save(tmp_path, name, settings.pop("adapter"), **settings)
    again = load(tmp_path, name)
    assert_equal_trees(again.adapter, first.adapter)
    assert again._replace(adapter=0) == first._replace(adapter=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_updates_in_the_file_are_those_of_merge(name, tmp_path):
    """W + (α/r) B A by the names of the file, with the tensors of the export."""
    adapter, targets = random_adapter(name)
    save(tmp_path, name, adapter, targets)
    pretrained = load_fixture(name).pretrained
    merged = lora.merge(pretrained.params, adapter, scale=5 / 3)
    save_pretrained(tmp_path / "merged", pretrained._replace(params=merged))
    want = load_file(tmp_path / "merged" / "model.safetensors")
    got = load_file(FAMILIES / name / "model.safetensors")
    update = load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in [key for key in update if "lora_A" in key]:
        A, B = update[key], update[key.replace("lora_A", "lora_B")]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        (target,) = [t for t in settings["target_modules"] if module.endswith("." + t)]
        assert settings["rank_pattern"].get(target, settings["r"]) == len(A)
        alpha = settings["alpha_pattern"].get(target, settings["lora_alpha"])
        delta = alpha / len(A) * B @ A
        delta = delta.T if settings["fan_in_fan_out"] else delta
        got[f"{module}.weight"] = got[f"{module}.weight"] + delta
    assert got.keys() == want.keys()
    for key in got:
        np.testing.assert_allclose(got[key], want[key], atol=1e-5, err_msg=key)


def test_names_and_shapes(tmp_path):
    save(tmp_path, "qwen2", *random_adapter("qwen2", ("key", "down")))
    found = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {"self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 36)}
    assert {name: x.shape for name, x in found.items()} == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight": shape
        for layer in range(2)
        for module, (out, width) in shapes.items()
        for half, shape in [("A", (3, width)), ("B", (out, 3))]
    }
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "target_modules": ["k_proj", "down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
    }


def test_a_fused_update_by_hand(tmp_path):
    """GPT-2: columns of c_attn are query, key, value; here query and value, rank 3."""
    adapter, targets = random_adapter("gpt2", ("query", "value"))
    save(tmp_path, "gpt2", adapter, targets)
    found = load_file(tmp_path / "adapter_model.safetensors")
    module = "base_model.model.transformer.h.1.attn.c_attn"
    A, B = (found[f"{module}.lora_{half}.weight"] for half in "AB")
    assert (A.shape, B.shape) == ((6, 32), (96, 6))
    value = adapter["layers"]["attention"]["value"]
    np.testing.assert_array_equal(A[3:], value["lora_a"][1].T)
    np.testing.assert_array_equal(B[64:, 3:], value["lora_b"][1].T)
    assert not B[32:64].any() and not B[64:, :3].any() and not B[:32, 3:].any()


def test_a_head_goes_with_the_adapter(tmp_path):
    adapter, targets = random_adapter("llama_score")
    head = {"kernel": np.random.default_rng(3).normal(size=(32, 1)).astype(np.float32)}
    save(tmp_path, "llama_score", adapter | {"score": head}, targets)
    assert_equal_trees(load(tmp_path, "llama_score").adapter["score"], head)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    assert settings["modules_to_save"] == ["score"]
    head["bias"] = np.zeros(1, np.float32)
    with pytest.raises(UserError, match="head has a bias"):
        save(tmp_path, "llama_score", adapter | {"score": head}, targets)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama_score"])
def test_leaves_go_to_their_places_on_a_mesh_and_back(name, tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    found, want = load(PEFT / name, name, mesh=mesh), load(PEFT / name, name)
    assert_equal_trees(jax.device_get(found.adapter), jax.device_get(want.adapter))
    places = sharding.param_shardings(want.adapter, mesh)
    jax.tree.map(
        lambda x, place: np.testing.assert_equal(x.sharding, place),
        found.adapter,
        places,
    )
    query = found.adapter["layers"]["attention"]["query"]["lora_a"]
    assert query.sharding.shard_shape(query.shape)[1] == 16
    settings = found._asdict()
    save(tmp_path, name, settings.pop("adapter"), **settings)
    assert_equal_trees(load(tmp_path, name).adapter, want.adapter)


def test_half_precision_is_read_as_float32(spoiled):
    halve = lambda tensors: {
        name: x.astype(ml_dtypes.bfloat16 if "lora_A" in name else np.float16)
        for name, x in tensors.items()
    }
    found = load(spoiled("qwen3", halve), "qwen3").adapter["layers"]["mlp"]["up"]
    want = load(PEFT / "qwen3", "qwen3").adapter["layers"]["mlp"]["up"]
    a = np.asarray(want["lora_a"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found["lora_a"], a)
    b = np.asarray(want["lora_b"]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found["lora_b"], b)
    assert found["lora_a"].dtype == found["lora_b"].dtype == np.float32


def test_an_adapter_of_the_bare_trunk(spoiled):
    """PEFT on transformers' AutoModel: no "model." before the names."""
    strip = lambda tensors: {
        name.replace("base_model.model.model.", "base_model.model."): x
        for name, x in tensors.items()
    }
    assert_equal_trees(
        load(spoiled("gemma", strip), "gemma").adapter,
        load(PEFT / "gemma", "gemma").adapter,
    )


def without(part):
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def more(name, shape=(2, 2)):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILED = [
    (
        "llama",
        without("layers.0.self_attn.q_proj.lora_A"),
        {},
        rf"lacks {QUERY}.lora_A",
    ),
    ("llama", more(f"{QUERY}.lora_B.weight", (8, 2)), {}, r"\(8, 2\).*means 32 on"),
    ("llama", more(f"{QUERY}.lora_A.weight", (4, 32)), {}, r"4 \(A\) and 2 \(B\); .*2"),
    ("llama", lambda t: t, {"r": 4}, r"the ranks 3 \(A\) and 3 \(B\); .* says 4"),
    ("llama", more("base_model.model.lm_head.lora_A.weight"), {}, "lm_head.*no place"),
    ("llama", more(f"{QUERY}.lora_magnitude_vector"), {}, "magnitude.*no place"),
    (
        "llama",
        more("base_model.model.model.layers.7.mlp.x"),
        {},
        r"layers\.7.*no place",
    ),
    ("llama", lambda t: {}, {}, "holds no tensors"),
    ("llama", lambda t: t, {"bias": "all"}, "bias='all'"),
    ("llama_score", without("score"), {}, r"lacks base_model.model.score.weight"),
    ("llama_score", lambda t: t, {"modules_to_save": None}, r"score.weight.*no place"),
    ("llama_score", more("base_model.model.score.bias"), {}, r"score\.bias.*no place"),
]


@pytest.mark.parametrize(("name", "change", "settings", "words"), SPOILED)
def test_broken_adapters_are_refused(spoiled, name, change, settings, words):
    folder = spoiled(name, change, **settings)
    with pytest.raises(UserError, match=words) as caught:
        load(folder, name)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_of_other_models_are_refused():
    with pytest.raises(UserError, match="no place"):
        load(PEFT / "gpt2", "llama")
    with pytest.raises(UserError, match="the adapter is of another model"):
        load(PEFT / "gemma", "llama")


def test_weights_that_cannot_be_opened(spoiled):
    folder = spoiled("llama")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is truncated"):
        load(folder, "llama")
    path.unlink()
    with pytest.raises(UserError, match=r"is missing.*never opened"):
        load(folder, "llama")


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path):
    (tmp_path / ".writing").mkdir()  # of a save that was killed
    (tmp_path / ".writing" / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "tokenizer.json").write_text("{}")
    save(tmp_path, "llama", *random_adapter("llama"))
    adapter, targets = random_adapter("llama", ("out",))
    save(tmp_path, "llama", adapter, targets)
    assert_equal_trees(load(tmp_path, "llama").adapter, adapter)
    files = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_a_crash_leaves_no_adapter(tmp_path, monkeypatch):
    save(tmp_path, "llama", *random_adapter("llama"))

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "llama", *random_adapter("llama"))
    with pytest.raises(UserError, match="not an adapter"):
        load(tmp_path, "llama")


def test_mistakes_in_saving(tmp_path):
    adapter, targets = random_adapter("llama", ("query",))
    with pytest.raises(ValueError, match=r"on \{'query'\}, its targets are"):
        save(tmp_path, "llama", adapter, [*targets, "up"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write an adapter to"):
        save(tmp_path / "file", "llama", adapter, targets)


PROCESS = """
import pathlib, sys
import jax
from rlhf_jax import hosts, sharding
from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.model_files import read_config
from rlhf_jax.models.peft_files import load_adapter, save_adapter

hosts.join_hosts()
source, model, out = map(pathlib.Path, sys.argv[1:])
hf_config = read_config(model)
config = config_from_hf(hf_config)
mesh = sharding.make_mesh(1, 2, 1)
settings = load_adapter(source, config, hf_config, mesh=mesh)._asdict()
adapter = settings.pop("adapter")
assert not adapter["layers"]["mlp"]["up"]["lora_a"].is_fully_addressable
out = out / str(jax.process_index())
save_adapter(out, adapter, config, hf_config, **settings)
print(out.exists())
"""


def test_one_of_two_hosts_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    alone = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    folders = [PEFT / "llama", FAMILIES / "llama", tmp_path]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, folders)],
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
    assert [words.split()[-1] for words, _ in outputs] == ["True", "False"]
    want = load(PEFT / "llama", "llama").adapter
    assert_equal_trees(load(tmp_path / "0", "llama").adapter, want)

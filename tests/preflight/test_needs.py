import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from rlhf_jax import preflight, sharding
from rlhf_jax.data.packing import Rows
from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.transformer import make_model
from rlhf_jax.preflight import needs
from rlhf_jax.trainers import offline, sft

V, D, L, F = 512, 64, 3, 128
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
# The table, two norms and four square matrices a layer, three of the MLP, one norm.
WEIGHTS = 4 * (V * D + L * (2 * D + 4 * D * D + 3 * D * F) + D)


def config_of(algorithm, **changes):
    config = importlib.import_module(f"configs.{algorithm}").get_config().to_dict()
    config = ConfigDict(config, type_safe=False)
    config.update({"model": LLAMA, "judges": {}, "dropout": 0.0})
    config.rewards = {"letters": {"source": "a.module:function", "weight": 1.0}}
    names = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(names)
    return config


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def held(algorithm, mesh=None, **changes):
    found = preflight.estimate(config_of(algorithm, **changes), mesh or mesh_of())
    return dict(found.resident)


def test_what_lives_all_through_a_run():
    """GRPO has a copy to compare with, PPO a critic with a head [D, 1] too."""
    moments = 2 * WEIGHTS
    grpo = {"weights": WEIGHTS, "reference": WEIGHTS, "optimizer moments": moments}
    assert held("grpo") == grpo
    critic = WEIGHTS + 4 * D
    moments = 2 * (WEIGHTS + critic)
    want = {"weights": WEIGHTS, "reference": WEIGHTS, "optimizer moments": moments}
    assert held("ppo") == want | {"critic": critic}
    shared = held("ppo", critic__shared=True)
    assert shared["critic"] == 4 * D
    assert "reference" not in held("dpo", evaluate_kl=False)
    assert held("dpo", evaluate_kl=True)["reference"] == WEIGHTS
    assert held("sft") == {"weights": WEIGHTS, "optimizer moments": 2 * WEIGHTS}
    scored = held("reward_model")
    assert scored == {"weights": critic, "optimizer moments": 2 * critic}


def test_an_adapter_has_no_reference_and_few_moments():
    """Rank 4 on query and up: A [D, 4] and B [4, D] or [4, F] in each layer."""
    adapter = 4 * L * 4 * ((D + D) + (D + F))
    found = held("grpo", lora__rank=4, lora__targets=("query", "up"))
    assert found == {"weights": WEIGHTS + adapter, "optimizer moments": 2 * adapter}


def test_frozen_weights_have_no_moments_and_are_not_copied():
    learns = WEIGHTS - 4 * V * D
    found = held("grpo", freeze=("embed",))
    assert found["weights"] == WEIGHTS
    assert found["reference"] == learns
    assert found["optimizer moments"] == 2 * learns


def test_reward_models_are_counted_once_each():
    source = {"source": ["builtin:reward", "builtin:reward"], "weight": 1.0}
    config = config_of("grpo")
    config.rewards = {"two": source}
    two = preflight.estimate(config, mesh_of()).resident["reward models"]
    config.rewards = {"one": {"source": "builtin:reward", "weight": 1.0}}
    one = preflight.estimate(config, mesh_of()).resident["reward models"]
    assert two == 2 * one > 0


def test_only_fsdp_and_tensor_cut_the_weights():
    """Norms, D floats in each of 2 L + 1 places, are whole on every device."""
    norms = 4 * (2 * L + 1) * D
    assert held("sft", mesh_of(data=8))["weights"] == WEIGHTS
    for mesh in (mesh_of(fsdp=8), mesh_of(tensor=8), mesh_of(fsdp=4, tensor=2)):
        assert held("sft", mesh)["weights"] == norms + (WEIGHTS - norms) // 8


def test_the_cache_is_as_large_as_the_models_own():
    """4 prompts of 8 tokens, 2 responses each of 16; prompts are kept beside them."""
    model = make_model(config_from_hf(LLAMA))

    def bytes_of(rows, length):
        ids = jnp.zeros((rows, 8), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0))
        fill = lambda params: model.prefill(params, ids, ids == 0, cache_length=length)
        _, cache = jax.eval_shape(fill, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))

    settings = {"prompts": 4, "group": 2, "prompt_tokens": 8, "max_new_tokens": 16}
    config = config_of("grpo", **{f"rollout__{k}": v for k, v in settings.items()})
    found = preflight.estimate(config, mesh_of()).stages["rollout"]
    assert found["KV cache"] == bytes_of(8, 24) + bytes_of(4, 8)


def test_logits_are_of_a_chunk_a_micro_batch_and_a_device():
    """16 pairs are 32 rows of 39 learned tokens; four arrays of float32."""

    def logits(mesh, **changes):
        changes |= {"learning__batch": 16, "sequence_tokens": 40}
        config = config_of("dpo", model__vocab_size=16 * V, **changes)
        return preflight.estimate(config, mesh).stages["update"].get("logits")

    whole = 4 * 4 * 32 * 39 * 16 * V
    assert logits(mesh_of()) == whole
    assert logits(mesh_of(), learning__accumulation=4) == whole // 4
    assert logits(mesh_of(data=2, fsdp=2)) == whole // 4
    assert logits(mesh_of(tensor=2)) == whole // 2
    assert logits(mesh_of(), logprob_chunk=13) == whole // 3
    assert logits(mesh_of(), logprob_chunk=1) is None  # a layer needs more


def test_fused_attention_keeps_no_scores():
    """[8, 60, 60] float32 for each of 16 rows: with bfloat16 on GPUs cuDNN has none."""

    def needed(platform, dtype):
        settings = {"learning__batch": 16, "sequence_tokens": 60, "remat": False}
        config = config_of("sft", dtype=dtype, logprob_chunk=1, **settings)
        update = preflight.estimate(config, mesh_of(), platform).stages["update"]
        return update["activations kept"]

    assert needed("gpu", "float32") == needed("cpu", "float32")
    scores = needed("cpu", "bfloat16") - needed("gpu", "bfloat16")
    assert scores >= L * 16 * 8 * 60 * 60 * 4
    assert needed("tpu", "bfloat16") == needed(
        "cpu", "bfloat16"
    )  # not below 128 tokens


def test_on_tpus_the_mesh_of_a_run_changes_nothing():
    config = config_of("sft", learning__batch=16, sequence_tokens=128, dtype="bfloat16")
    config.remat = False
    here = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    total = lambda: preflight.estimate(config, here, "tpu").total
    alone = total()
    needs._kept_of_row.cache_clear()
    with jax.set_mesh(here):
        assert total() == alone
    assert alone < preflight.estimate(config, here, "cpu").total


def test_a_critic_learns_beside_the_policy():
    """Which it is as large as; on a shared trunk there is none."""
    beside = lambda **how: preflight.estimate(
        config_of("ppo", logprob_chunk=1, **how), mesh_of()
    ).stages["update"]
    apart, shared = beside(), beside(critic__shared=True)
    own = shared["activations kept"] + shared["one layer's backward pass"]
    assert apart["critic's backward pass"] == pytest.approx(own, abs=2)
    assert not shared["critic's backward pass"]


def test_what_fsdp_gathers():
    """At the logits the table and its gradient, cut by tensor alone."""

    def gathered(mesh, **changes):
        changes |= {"learning__batch": 16, "sequence_tokens": 40}
        config = config_of("dpo", model__vocab_size=16 * V, **changes)
        return preflight.estimate(config, mesh).stages["update"]["gathered weights"]

    table = 16 * V * D
    assert gathered(mesh_of(data=8)) == 0
    assert gathered(mesh_of(fsdp=2)) == gathered(mesh_of(fsdp=8)) == table * (4 + 4)
    assert gathered(mesh_of(fsdp=2, tensor=2)) == table // 2 * (4 + 4)
    assert gathered(mesh_of(fsdp=2), dtype="bfloat16") == table * (2 + 4)


def test_what_a_derivative_keeps():
    """sin keeps cos x; the product keeps x, which is an argument, and sin x."""
    x = jnp.ones((5, 3))
    assert needs._kept(jnp.sin, x) == 4 * 15
    assert needs._kept(lambda x: x * jnp.sin(x), x) == 2 * 4 * 15
    assert needs._kept(lambda x: 2.0 * x, x) == 0


def test_remat_keeps_the_stream_alone():
    """From one layer to the next [B, T, D] and no more, in either dtype."""
    shape = config_from_hf(LLAMA)
    deeper = config_from_hf(LLAMA | {"num_hidden_layers": L + 2})
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        per_row = [
            needs._kept_of_row(found, dtype, "", 32, "cpu") for found in (shape, deeper)
        ]
        assert per_row[1] - per_row[0] == 2 * size * 32 * D


@pytest.mark.parametrize("remat", [True, False])
def test_the_compiled_update_needs_what_was_planned(remat):
    """To 15 %, of the step of supervised fine-tuning as XLA compiles it."""
    rows, tokens = 16, 64
    changes = {"learning__batch": rows, "sequence_tokens": tokens}
    config = config_of("sft", remat=remat, **changes)
    del config.rollout
    config.optimizer.warmup_steps = 0
    planned = preflight.estimate(config, mesh_of()).total

    model = make_model(config_from_hf(LLAMA), remat=remat)
    params = jax.eval_shape(model.init, jax.random.key(0))
    mesh = jax.make_mesh(
        (1, 1, 1),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:1],
    )
    optimizer = sft.offline.make_optimizer(config.optimizer, 1e-3, 10)
    moments = jax.eval_shape(optimizer.init, params)
    update = offline.make_update(
        sft.make_loss(model, config), optimizer, counts=sft.count_learned
    )
    batch = [
        np.zeros((1, rows, tokens), kind) for kind in (np.int32, np.int32, np.bool_)
    ]
    with jax.set_mesh(mesh):
        state = offline.State(params, moments)
        lowered = update.lower(state, Rows(*batch), jax.random.key(1))
    told = lowered.compile().memory_analysis()
    measured = told.argument_size_in_bytes + told.temp_size_in_bytes
    measured += told.output_size_in_bytes - told.alias_size_in_bytes
    assert planned == pytest.approx(measured, rel=0.15)


def test_a_layer_that_is_recomputed_needs_for_a_moment_what_all_keep_without():
    """Two layers more without remat keep twice what one needs while it is redone."""
    rows, tokens = 4, 32
    changes = {"learning__batch": rows // 2, "sequence_tokens": tokens}

    def update(**more):
        config = config_of("reward_model", **changes, **more)
        return preflight.estimate(config, mesh_of()).stages["update"]

    deeper = update(remat=False, model__num_hidden_layers=L + 2)["activations kept"]
    layer = (deeper - update(remat=False)["activations kept"]) / 2
    found = update(remat=True)["one layer's backward pass"]
    assert found == pytest.approx(layer, abs=2)
    assert found > 4 * rows * tokens * (3 * F + 5 * D)

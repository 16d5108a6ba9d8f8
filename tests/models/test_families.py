import jax
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import RopeScaling
from rlhf_jax.models.families import FAMILIES, config_from_hf
from rlhf_jax.models.transformer import make_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}


def config_of(kind, **settings):
    return config_from_hf({"model_type": kind, **SIZES, **settings})


def test_logits_equal_those_of_transformers(family):
    """Left- and right-padded, at every real token."""
    model, params, arrays = family.model, family.pretrained.params, family.arrays
    for side in range(2):
        mask = arrays["mask"][side]
        hidden = model.apply(params, arrays["tokens"][side], mask)
        got = model.unembed(params, hidden)
        real = mask.astype(bool)
        want = arrays["logits"][side]
        np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-4)


def test_scores_equal_those_of_transformers(classifier):
    model, arrays = classifier.model, classifier.arrays
    params = classifier.pretrained.params
    for side in range(2):
        mask = arrays["mask"][side]
        got = model.score(params, model.apply(params, arrays["tokens"][side], mask))
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        got = np.take_along_axis(np.asarray(got), last[:, None], 1)[:, 0]
        np.testing.assert_allclose(got, arrays["scores"][side], atol=1e-4)


def test_absent_settings_mean_what_transformers_says():
    assert config_from_hf(GPT2).tied_embeddings
    assert config_from_hf(GPT2).d_ff == 128
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gpt_neox"):
        assert not config_of(kind).tied_embeddings, kind
    for kind in ("gemma", "gemma2", "gemma3_text"):
        config = config_of(kind)
        assert config.tied_embeddings, kind
        assert config.head_dim == 256, kind
    llama = config_of("llama", num_key_value_heads=None, head_dim=None)
    assert (llama.num_kv_heads, llama.head_dim) == (4, 8)
    assert config_of("llama").rope_theta == 10_000.0
    assert config_of("mistral").slides == (True,) * 6
    assert config_of("mistral", sliding_window=None).slides == (False,) * 6
    assert config_of("qwen2", sliding_window=8).slides == (False,) * 6
    assert config_of("qwen2").qkv_bias and not config_of("qwen2").attention_out_bias
    neox = config_of("gpt_neox")
    assert (neox.rope_fraction, neox.parallel_residual) == (0.25, True)
    gemma2 = config_of("gemma2")
    assert gemma2.slides == (True, False) * 3
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    gemma3 = config_of("gemma3_text")
    assert gemma3.slides == (True,) * 5 + (False,)
    assert (gemma3.rope_theta, gemma3.rope_local_theta) == (1e6, 1e4)
    assert gemma3.attention_softcap is None and gemma3.logit_softcap is None


def test_gemma_calls_the_tanh_form_gelu():
    assert config_of("gemma", hidden_act="gelu").activation == "gelu_tanh"
    assert config_of("gpt_neox", hidden_act="gelu").activation == "gelu"


def test_qwen_slides_from_max_window_layers_on():
    config = config_of(
        "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=4
    )
    assert config.slides == (False,) * 4 + (True,) * 2


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            "gpt_neox",
            {"rotary_emb_base": 500, "rotary_pct": 0.5},
            {"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5}},
        ),
        (
            "gemma3_text",
            {
                "rope_theta": 2e6,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 3,
            },
            {
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "linear",
                        "factor": 8.0,
                        "rope_theta": 2e6,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                },
                "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
            },
        ),
    ],
)
def test_old_and_new_spelling_mean_the_same(kind, old, new):
    assert config_of(kind, **old) == config_of(kind, **new)
    assert config_of(kind, **old) != config_of(kind)


def test_llama3_scaling_is_read():
    config = config_of("llama", rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 16)


@pytest.mark.parametrize(
    ("hf_config", "words"),
    [
        ({"model_type": "bert"}, "'bert'.*gpt2, gpt_neox, llama, mistral"),
        ({}, "None.*gemma3_text"),
        ({"model_type": "llama", "hidden_size": 8}, "lacks 'num_attention_heads'"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True"),
        ({**GPT2, "activation_function": "mish"}, "'mish'; supported are gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'.*llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "qwen2", "layer_types": ["chunked"] * 6}, "'chunked'"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "1 layers .* 6"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "bidirection"),
    ],
)
def test_unsupported_models_are_refused_in_one_sentence(hf_config, words):
    if "n_embd" not in hf_config and "hidden_size" not in hf_config and hf_config:
        hf_config = {"model_type": "llama", **SIZES, **hf_config}
    with pytest.raises(UserError, match=words) as caught:
        config_from_hf(hf_config)
    assert "\n" not in str(caught.value)


def test_every_family_names_every_leaf_once():
    for kind, family in FAMILIES.items():
        config = config_from_hf(GPT2) if kind == "gpt2" else config_of(kind)
        paths = [path for row in family.rows(config) for path in row.paths]
        assert len(paths) == len(set(paths))
        abstract = jax.eval_shape(make_model(config).init, jax.random.key(0))
        leaves = jax.tree_util.tree_leaves_with_path(abstract)
        ours = {"/".join(key.key for key in path) for path, _ in leaves}
        assert set(paths) == ours - {"unembed/kernel"}, kind

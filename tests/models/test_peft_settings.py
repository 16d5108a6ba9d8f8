import json
import math

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.peft_settings import (
    module_settings,
    rank_and_scale,
    read_settings,
)

GPT2 = [
    "transformer.h.{}.attn.c_attn",
    "transformer.h.{}.attn.c_proj",
    "transformer.h.{}.mlp.c_proj",
]


@pytest.fixture
def written(tmp_path):
    """Write settings to a file and give its path."""

    def write(text):
        path = tmp_path / "adapter_config.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return path

    return write


def test_ranks_and_scales_by_pattern():
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 16},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3, "proj": 100},
    }
    assert rank_and_scale(settings) == (4, 2.0)
    assert rank_and_scale(settings, "model.layers.0.self_attn.q_proj") == (2, 4.0)
    assert rank_and_scale(settings, "model.layers.1.self_attn.v_proj") == (16, 0.5)
    assert rank_and_scale(settings, "model.layers.0.self_attn.v_proj") == (4, 2.0)
    assert rank_and_scale(settings, "model.layers.0.mlp.up_proj") == (4, 0.75)
    assert rank_and_scale({}) == (8, 1.0)


def test_rank_stabilised_scales():
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"x": 9}}
    assert rank_and_scale(settings) == (4, 3.0)
    assert rank_and_scale(settings, "a.x") == (9, 2.0)
    assert rank_and_scale(settings | {"r": 2}) == (2, 6 / math.sqrt(2))


def test_modules_are_named_as_shortly_as_can_be():
    ranks = {GPT2[0]: 9, GPT2[2]: 3}
    got = module_settings(ranks, GPT2, rank=3, alpha=5)
    assert got["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert (got["r"], got["lora_alpha"]) == (3, 5)
    assert got["rank_pattern"] == {"c_attn": 9}
    assert got["alpha_pattern"] == {"c_attn": 15}
    got = module_settings(ranks, GPT2, rank=3, alpha=0.5)
    assert (got["lora_alpha"], got["alpha_pattern"]) == (0.5, {"c_attn": 1.5})


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"bias": "none", "use_dora": None, "init_lora_weights": "gaussian"},
        {"modules_to_save": ["classifier", "score"], "use_rslora": True},
        {"init_lora_weights": None, "modules_to_save": None, "rank_pattern": {}},
    ],
)
def test_plain_adapters_are_read(written, plain):
    settings = {"peft_type": "LORA"} | plain
    assert read_settings(written(settings)) == settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; supported are LoRA"),
        ({"bias": "all", "use_dora": True}, "bias='all', use_dora=True; supp"),
        ({"modules_to_save": ["lm_head", "score"]}, r"modules_to_save=\['lm_head', 's"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"target_parameters": ["experts"]}, r"target_parameters=\['experts'\]"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
        ({"r": 0}, "r 0; it must be a number above 0"),
        ({"r": True}, "r True; it must be a number above 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "r 1.5; it must"),
        ({"lora_alpha": "16"}, "lora_alpha '16'; it must"),
        ({"alpha_pattern": {"q_proj": 0}}, "lora_alpha 0; it must"),
        ({"rank_pattern": {"q_proj(": 1}}, r"'q_proj\('.*regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern \[1\].*table"),
        ([], "holds no JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_what_is_not_supported_is_one_sentence(written, settings, words):
    path = written(settings)
    with pytest.raises(UserError, match=words) as caught:
        read_settings(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_settings(tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config.json: not an adapter"):
        read_settings(tmp_path / "adapter_config.json")

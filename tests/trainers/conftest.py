"""A tiny world: a tokenizer, random models and texts that fit, and how to run in it."""

import importlib
import itertools
import os
import pathlib
from typing import NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType

from rlhf_jax import sharding
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.models.families import config_from_hf
from rlhf_jax.models.pretrained import Pretrained, save_pretrained
from rlhf_jax.models.transformer import make_model
from rlhf_jax.train import train

NOUNS = ("cat", "dog", "bird", "fish", "tree", "house", "river", "child")
VERBS = ("sees", "likes", "finds", "leaves")
ENDS = ("It was good.", "It was bad.", "Nobody knew.")
SENTENCES = [
    f"The {one} {verb} the {other}. {end}"
    for one, verb, other, end in itertools.product(NOUNS, VERBS, NOUNS, ENDS)
]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

OF_ALGORITHM = {
    "ppo": {"rollout.prompts": 16, "optimizer.critic_lr": 1e-2},
    "grpo": {
        "rollout.prompts": 4,
        "rollout.group": 4,
        "total_phases": 12,
        "remat": False,
    },
}


class World(NamedTuple):
    """What a run is given, on disk."""

    folder: pathlib.Path
    policy: pathlib.Path
    reward: pathlib.Path
    prompts: pathlib.Path
    texts: pathlib.Path

    def settings(self, algorithm: str) -> dict[str, object]:
        """What a tiny run changes in configs/<algorithm>.py, by dotted name."""
        shared = {
            "model": str(self.policy),
            "data.train": str(self.prompts),
            "data.heldout": str(self.prompts),
            "data.heldout_limit": 16,
            "rollout.max_new_tokens": 6,
            "rewards.human.source": "tests.trainers.reward_functions:letters",
            "judges.vader.source": "rlhf_jax.rewards.functions:distinct_words",
            "optimizer.lr": 1e-2,
            "optimizer.schedule": "constant",
            f"{algorithm}.kl_coef": 0.02,
            "total_phases": 16,
            "evaluate_every": 5,
            "samples_every": 8,
            "checkpoint.every": 3,
        }
        return shared | OF_ALGORITHM[algorithm]

    def config(self, algorithm, workdir, /, **changes):
        """That file with `settings` and `changes`, `__` in the place of dots."""
        config = importlib.import_module(f"configs.{algorithm}").get_config()
        config.workdir = str(workdir)
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        config.update_from_flattened_dict(self.settings(algorithm) | changes)
        return config

    def ppo_config(self, workdir, **changes):
        return self.config("ppo", workdir, **changes)

    def grpo_config(self, workdir, **changes):
        return self.config("grpo", workdir, **changes)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = World(
        folder,
        *(folder / name for name in ("policy", "reward", "prompts.txt", "texts.txt")),
    )
    tokenizer = train_tokenizer(SENTENCES, LLAMA["vocab_size"])
    shape = config_from_hf(LLAMA)
    init = jax.jit(make_model(shape).init, static_argnames="head")
    for number, directory in enumerate((made.policy, made.reward)):
        params = init(jax.random.key(number), head=directory == made.reward)
        save_pretrained(directory, Pretrained(shape, LLAMA, params))
        tokenizer.save_pretrained(directory)
    prompts = itertools.product(NOUNS, VERBS, NOUNS)
    lines = [f"The {one} {verb} the {other}" for one, verb, other in prompts]
    made.prompts.write_text("\n".join(lines) + "\n", "utf-8")
    made.texts.write_text("\n".join(SENTENCES) + "\n", "utf-8")
    return made


# Most of the time of a tiny run is XLA's: little of it, and nothing compiled twice.
QUICK = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_disable_most_optimizations": True,
}
USUAL = {
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
    "jax_disable_most_optimizations": False,
    "jax_compilation_cache_dir": None,
}


def configure(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    return QUICK | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla"))}


def runner(quick):
    """Gives `train(config)`, on one device or on all eight, as long as it is open."""
    configure(quick)

    def one_device(**sizes):
        return jax.make_mesh(
            (1, 1, 1),
            sharding.AXES,
            axis_types=(AxisType.Auto,) * 3,
            devices=jax.devices()[:1],
        )

    def run(config, *, devices=1):
        with pytest.MonkeyPatch.context() as patch:
            if devices == 1:
                patch.setattr(sharding, "make_mesh", one_device)
            train(config)

    yield run
    configure(USUAL)


@pytest.fixture(scope="module")
def run(quick):
    """`train(config)`, on one device or on all eight."""
    yield from runner(quick)


@pytest.fixture(scope="session")
def alone(quick) -> dict[str, str]:
    """The environment of a process of its own, with a single device."""
    return {
        **os.environ,
        **{name.upper(): str(value) for name, value in quick.items()},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }


@pytest.fixture
def quick_compilation():
    """Most of the time of one update is XLA's, and tiny arrays need no fast code."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

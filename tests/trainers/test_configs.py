"""The config files that ship: what the README's commands run."""

import importlib
import json
import pathlib

import pytest

from configs import ppo, ppo_imdb
from rlhf_jax.train import ALGORITHMS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_every_config_names_an_algorithm_and_says_how_it_is_run(name):
    module = importlib.import_module(f"configs.{name}")
    assert module.get_config().algorithm in ALGORITHMS
    assert f"--config=configs/{name}.py" in module.__doc__


def test_the_imdb_preset_has_the_settings_of_ppo():
    own = {"rewards", "judges"}
    keys = lambda config: {name for name in config if name not in own}
    assert keys(ppo_imdb.get_config()) == keys(ppo.get_config())
    assert ppo_imdb.get_config().model == "gpt2"


def test_one_phase_of_the_default(run, tmp_path):
    """On the models and prompts of the package, untouched but for its size."""
    config = ppo.get_config()
    config.workdir = str(tmp_path / "run")
    config.total_phases = 1
    config.data.heldout_limit = 16
    run(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    before, after = (json.loads(line) for line in lines)
    assert before["heldout/kl"] == 0
    assert after["response/finished"] > 0.5
    assert after["heldout/kl"] > 0

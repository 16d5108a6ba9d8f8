"""Small runs to be analysed, each trained once."""

import json
import shutil

import pytest

from rlhf_jax.analysis.analyzer import AlignmentAnalyzer
from tests.trainers.conftest import alone, quick, runner, world
from tests.trainers.one_phase import single_mesh

__all__ = ["alone", "quick", "world"]

EVERY_PHASE = {
    "evaluate_every": 1,
    "samples_every": 0,
    "checkpoint__every": 1,
    "monitor__action": "off",
}


@pytest.fixture(scope="package")
def run(quick):
    """`train(config)`, on one device or on all eight."""
    yield from runner(quick)


@pytest.fixture(scope="package")
def ppo(world, run, tmp_path_factory):
    """The folder of a PPO run of three phases, each of them evaluated and saved."""
    workdir = tmp_path_factory.mktemp("runs") / "ppo"
    run(world.ppo_config(workdir, total_phases=3, **EVERY_PHASE))
    return workdir


@pytest.fixture
def ppo_copy(ppo, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(ppo, tmp_path / "ppo")


@pytest.fixture
def edit(ppo_copy):
    """`edit(change)`: the copy, its config changed in place."""

    def edit(change):
        path = ppo_copy / "config.json"
        config = json.loads(path.read_text("utf-8"))
        change(config)
        path.write_text(json.dumps(config), "utf-8")
        return ppo_copy

    return edit


def analyze(workdir, **settings):
    """An analyzer on one device, for the sixteen held-out prompts."""
    return AlignmentAnalyzer(
        workdir, **{"mesh": single_mesh(), "num_samples": 16, **settings}
    )

"""The same run everywhere: one device, eight on any mesh, two and four processes.

Here are the smallest cases; benchmarks/everywhere.py has all of them.
"""

import functools
import itertools
import json
import os
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax import keys, loading, progress, run_files, sharding
from rlhf_jax.data import reviews
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.rollout.sampler import sampler_of
from rlhf_jax.train import train
from tests import processes

from .conftest import World
from .runs import metrics_of
from .test_dpo_runs import dpo_config
from .test_runs import made_up_reviews

ALGORITHMS = ("ppo", "grpo", "dpo")
PROMPTS = 64  # answered greedily
LOSS = 1e-5
OTHERS = 1e-4  # sums over phases among them, and counts

# Learning rates at which rounding does not grow.
# Without remat, which takes XLA long; all cases have it as the configs do.
EVERYWHERE = bool(os.environ.get("EVERYWHERE"))
CALM = {} if EVERYWHERE else {"remat": False}
CALM |= {
    "optimizer__lr": 3e-4,
    "rollout__temperature": 0.7,
    "rollout__max_new_tokens": 12,
}
CHANGES = {
    "ppo": CALM | {"optimizer__critic_lr": 1e-3, "total_phases": 2},
    "grpo": CALM | {"total_phases": 2, "rollout__prompts": 8},  # for eight rows
    "dpo": CALM | {"total_phases": 2, "learning__steps_per_phase": 3},
}


class Case(NamedTuple):
    """Where a run computes."""

    processes: int
    devices: int  # of each
    data: int
    fsdp: int
    tensor: int

    def __str__(self) -> str:
        mesh = f"{self.data} x {self.fsdp} x {self.tensor}"
        return f"{self.processes} x {self.devices}, mesh {mesh}"


ALONE = Case(1, 1, 1, 1, 1)
ONE_PROCESS = [
    Case(1, 8, *sizes)
    for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if np.prod(sizes) == 8
]
SEVERAL = [
    *(Case(2, 4, *sizes) for sizes in ((2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8))),
    *(Case(4, 2, *sizes) for sizes in ((2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8))),
]
CASES = [*SEVERAL, *ONE_PROCESS] if EVERYWHERE else [Case(1, 8, 2, 2, 2), SEVERAL[0]]

# Of several processes on CPUs, Gloo now and then takes one message for another and ends
# them ("Received data size doesn't match"): not yet seen where no sums are combined.
GLOO = "--xla_disable_hlo_passes=all-reduce-combiner,cpu-all-reduce-combiner"

PROGRAM = """
import json, sys
from rlhf_jax import hosts

with hosts.joined():
    from tests.trainers import test_processes
    test_processes.work(*json.loads(sys.argv[1]))
"""


def work(world, folder, mesh):
    """Trains with each algorithm, then answers prompts greedily: in every process."""
    world, folder = World(*map(pathlib.Path, world)), pathlib.Path(folder)
    make = {name: functools.partial(world.config, name) for name in ("ppo", "grpo")}
    make["dpo"] = functools.partial(dpo_config, world)
    reviews.load_reviews = made_up_reviews
    for name in ALGORITHMS:
        config = make[name](folder / name, **CHANGES[name])
        config.mesh.update(mesh)
        train(config)
        tokens = [
            answer_greedily(config, source, world.prompts)
            for source in (config.model, f"{config.workdir}/export")
        ]
        if jax.process_index() == 0:
            np.save(folder / f"{name}.npy", tokens)


def answer_greedily(config, source, prompts):
    """Tokens [B, N] of a model's likeliest answers, token by token."""
    config = config.copy_and_resolve_references()
    config.rollout.temperature = 0.0
    texts = prompts.read_text("utf-8").splitlines()[:PROMPTS]
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        policy = loading.load_model(source, config, mesh)
        tokenizer = loading.load_run_tokenizer(config, progress.make_console())
        sample = sampler_of(config.rollout, policy.model, tokenizer, mesh)
        key = keys.branch_key(config.seed, keys.HELDOUT, 0)
        rollout = sample(policy.params, texts, key, range(len(texts)))
        return sharding.to_host(rollout.samples.tokens)


class Ran(NamedTuple):
    """What the algorithms left, and how the processes ended."""

    folder: pathlib.Path
    ended: list[processes.Ended]


def run_case(case, world, folder, env) -> Ran:
    mesh = dict(zip(sharding.AXES, case[2:], strict=True))
    arguments = json.dumps([[str(path) for path in world], str(folder), mesh])
    flags = f"--xla_force_host_platform_device_count={case.devices} {GLOO}"
    each = processes.given(case.processes) if case.processes > 1 else [{}]
    command = [sys.executable, "-c", PROGRAM, arguments]
    ended = processes.run(command, env | {"XLA_FLAGS": flags}, each, timeout=1200)
    for process in ended:
        assert process.status == 0, f"{case}: {process.err[-4000:]}"
    return Ran(folder, ended)


@pytest.fixture(scope="module")
def one(world, alone, tmp_path_factory):
    """What one device gives."""
    return run_case(ALONE, world, tmp_path_factory.mktemp("one"), alone)


@pytest.fixture(scope="module", params=CASES, ids=str)
def ran(request, world, alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    return request.param, run_case(request.param, world, folder, alone)


def differences(workdir, other):
    """The largest differences of two runs: of a loss, and of any metric.

    But for accuracies of DPO: until the first step chosen and rejected are worth the
    same, and rounding says which is worth more.
    """
    losses, others = {"": 0.0}, {"": 0.0}
    for row, expected in zip(metrics_of(workdir), metrics_of(other), strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - {"rewards/accuracy", "heldout/rewards/accuracy"}:
            kind = losses if "loss" in key else others
            kind[key] = max(kind.get(key, 0.0), abs(row[key] - expected[key]))
    worst = max(others, key=others.get)
    return max(losses.values()), others[worst], worst


def samples_of(workdir):
    """The texts of all phases, drawn at temperature 0.7."""
    return [
        [row["response"] for row in run_files.read_responses(workdir, phase)]
        for phase in run_files.response_phases(workdir)
    ]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_as_on_one_device(ran, one, algorithm):
    case, mine = ran
    loss, other, name = differences(mine.folder / algorithm, one.folder / algorithm)
    greedy, expected = (
        np.load(folder / f"{algorithm}.npy") for folder in (mine.folder, one.folder)
    )
    drawn, wanted = (
        samples_of(folder / algorithm) for folder in (mine.folder, one.folder)
    )
    tokens = (greedy == expected).sum()
    good = tokens == expected.size and drawn == wanted
    good = good and loss < LOSS and other < OTHERS
    if EVERYWHERE:
        print(
            f"\n| {case} | {algorithm} | {loss:.1e} | {other:.1e} {name} | {tokens} of "
            f"{expected.size} | {'the same' if drawn == wanted else 'others'} | "
            f"{'the same' if good else 'FAILED'} |"
        )
    assert good, (loss, other, name, tokens, expected.size, drawn == wanted)


def test_the_comparison_compares_something(one):
    """There are losses, and answers differ, though the likeliest repeat a token."""
    for name in ALGORITHMS:
        before, after = np.load(one.folder / f"{name}.npy")
        assert before.shape == (PROMPTS, 12)
        assert len(np.unique(after, axis=0)) > 1
        assert any("loss" in key for key in metrics_of(one.folder / name)[-1])
        assert (
            len({text for phase in samples_of(one.folder / name) for text in phase})
            > 10
        )


def test_process_0_alone_speaks_and_writes(ran):
    """The others say nothing but the line of the transport itself."""
    _, (folder, ended) = ran
    assert "phase 2/2" in ended[0].out
    for other in ended[1:]:
        assert processes.spoken(other.out) == []
        assert other.err == ""
    for name in ALGORITHMS:
        load_pretrained(folder / name / "export")
        assert not list((folder / name).rglob("*.tmp"))

"""Dynamic sampling, with a sampler and a reward that do as the test says."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs import grpo
from rlhf_jax import sharding
from rlhf_jax.data.prompts import Prompts
from rlhf_jax.rewards import Reward
from rlhf_jax.rollout.generate import Responses
from rlhf_jax.rollout.logprobs import Transcript
from rlhf_jax.rollout.sampler import Rollout
from rlhf_jax.trainers import informative, online

from .one_phase import SPLIT, single_mesh

GROUPS, GROUP = 4, 2
TEXTS = [f"p{i}" for i in range(32)]


class World(NamedTuple):
    """`collect`, and what it asked the sampler for: texts and index of each call."""

    collect: object
    asked: list
    plain: object  # the same phase without dynamic sampling


def make_world(differs, *, draws, mesh=None):
    """Groups whose number, counted over the draws of a phase, is in `differs`.

    A response's tokens are the index it was drawn with, its text names its prompt.
    """
    mesh = mesh or single_mesh()
    asked = []

    def sample(params, texts, key, index):
        asked.append((list(texts), list(index)))
        index = np.asarray(index)
        prompts = np.repeat([TEXTS.index(t) for t in texts], GROUP)
        real = np.ones((len(index), 1), bool)
        arrays = Transcript(prompts[:, None], real, index[:, None], real)
        samples = Responses(
            arrays.responses, arrays.mask, index[:, None] / 8.0, index % 3 == 0
        )
        arrays, samples = sharding.to_devices((arrays, samples), sharding.rows(mesh))
        names = [text for text in texts for _ in range(GROUP)]
        said = [f"{name} {i}" for name, i in zip(names, index)]
        return Rollout(names, said, arrays, samples)

    def score(prompts, responses):
        index = np.array([int(text.split()[1]) for text in responses])
        better = np.isin(index // GROUP, list(differs)) & (index % GROUP == 1)
        return 1.0 * better + index // GROUP

    def length(prompts, responses):
        return [float(len(text)) for text in responses]

    config = grpo.get_config()
    config.rollout.prompts, config.rollout.group = GROUPS, GROUP
    config.grpo.dynamic_sampling = draws
    rewards = [Reward("a", "", 1.0, score), Reward("b", "", 0.0, length)]
    given = config, mesh, sample, rewards, Prompts(TEXTS, {})
    return World(informative.make_collect(*given), asked, online.make_collect(*given))


def nothing(transcript, samples):
    return None


def drawn_as(collected):
    """The index that each row was drawn with."""
    return np.asarray(collected.rollout.transcript.responses)[:, 0].tolist()


def rows_of(*groups):
    return [group * GROUP + i for group in groups for i in range(GROUP)]


@pytest.mark.parametrize(
    ("differs", "draws", "taken", "kept", "drawn"),
    [
        # all of the first draw differ: it is taken as it is
        ({0, 1, 2, 3, 5}, 3, (0, 1, 2, 3), 4, 1),
        # the second draw, groups 4 to 7, makes up for what the first lacks
        ({1, 2, 4, 5, 6, 7}, 3, (1, 2, 4, 5), 4, 2),
        # the third still helps; those left over are not needed
        ({3, 6, 8, 9, 10}, 3, (3, 6, 8, 9), 4, 3),
        # a fourth draw there is not: the first that do not differ fill up
        ({6, 9, 12, 13, 14}, 3, (6, 9, 0, 1), 2, 3),
        (set(), 3, (0, 1, 2, 3), 0, 3),
        # one draw: nothing is drawn again, and what says nothing is left out
        ({1, 3}, 1, (1, 3, 0, 2), 2, 1),
        # off
        ({1, 3}, 0, (0, 1, 2, 3), 4, 1),
        (set(), 0, (0, 1, 2, 3), 4, 1),
    ],
)
def test_the_first_groups_that_differ(differs, draws, taken, kept, drawn):
    collect, asked, _ = make_world(differs, draws=draws)
    collected, rows_kept, count = collect(None, 1, nothing)
    assert drawn_as(collected) == rows_of(*taken)
    assert np.asarray(rows_kept).tolist() == [True] * kept * GROUP + [False] * (
        (GROUPS - kept) * GROUP
    )
    assert count == len(asked) == drawn


def test_all_that_belongs_to_a_row_goes_with_it():
    collect, *_ = make_world({1, 2, 4, 5}, draws=2)
    collected, _, _ = collect(None, 1, nothing)
    index = np.array(rows_of(1, 2, 4, 5))
    rollout = collected.rollout
    numbers = np.asarray(rollout.transcript.prompts)[:, 0]
    assert rollout.prompts == [TEXTS[i] for i in numbers]
    assert rollout.responses == [
        f"{name} {i}" for name, i in zip(rollout.prompts, index)
    ]
    np.testing.assert_array_equal(rollout.samples.logprobs[:, 0], index / 8.0)
    np.testing.assert_array_equal(rollout.samples.finished, index % 3 == 0)
    want = index // GROUP + (index % GROUP == 1)
    for scores in (collected.scores, collected.total, collected.parts["a"]):
        np.testing.assert_array_equal(scores, want)
    lengths = [len(text) for text in rollout.responses]
    np.testing.assert_array_equal(collected.parts["b"], lengths)
    assert collected.seconds.rollout > 0
    assert collected.seconds.reward > 0


def test_no_prompt_and_no_number_is_drawn_twice():
    """In two phases of three draws: 24 of the 32 prompts, each once."""
    collect, asked, _ = make_world(set(), draws=3)
    collect(None, 1, nothing)
    collect(None, 2, nothing)
    texts = [text for texts, _ in asked for text in texts]
    assert len(texts) == len(set(texts)) == 24
    numbers = [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert [index for _, index in asked] == numbers * 2


def test_a_phase_does_not_depend_on_those_before():
    """As after a resumption; nor on how often the phase before had to draw."""
    for differs in (set(), {0, 1, 2, 3}):
        collect, asked, _ = make_world(differs, draws=3)
        collect(None, 1, nothing)
        asked.clear()
        collect(None, 2, nothing)
        alone, asked_alone, _ = make_world(differs, draws=3)
        alone(None, 2, nothing)
        assert asked == asked_alone


def assert_same(collected, other):
    assert collected.rollout[:2] == other.rollout[:2]
    for mine, its in zip(
        jax.tree.leaves((collected.rollout[2:], collected[1:4])),
        jax.tree.leaves((other.rollout[2:], other[1:4])),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)


def test_off_is_the_phase_without_it():
    collect, asked, plain = make_world({1}, draws=0)
    for phase in (1, 2, 3):
        collected, kept, _ = collect(None, phase, nothing)
        assert_same(collected, plain(None, phase, nothing))
        assert kept.all()
        assert asked[-2] == asked[-1]


def test_on_eight_devices():
    """The same rows, over data and fsdp as the update wants them."""
    mesh = sharding.make_mesh(**SPLIT)
    differs = {1, 2, 5, 7}
    collected, kept, _ = make_world(differs, draws=2, mesh=mesh).collect(
        None, 1, nothing
    )
    want, want_kept, _ = make_world(differs, draws=2).collect(None, 1, nothing)
    assert_same(collected, want)
    np.testing.assert_array_equal(kept, want_kept)
    arrays = (*collected.rollout[2:], collected.scores, kept)
    for array in jax.tree.leaves(arrays):
        assert array.sharding.is_equivalent_to(sharding.rows(mesh), array.ndim)


def test_what_differs():
    scores = np.array([1, 1, 1, 1, 2, 1, 0, 0, 0], np.float32)
    assert informative.differing(scores, 3).tolist() == [False, True, False]
    assert informative.differing(scores, 1).tolist() == [False] * 9

"""What is measured on the models themselves: one pass over the phases, then one more.

At any time the reference and the policy of one phase are in memory, however many
phases there are:
    for each phase k
        1. restore π_k, and only it
        2. let it answer the same prompts, from the same keys           (answers)
        3. log π_k of these answers, and of those of the phase before
        4. how far weights and inner states are from the reference's    (weights,
                                                                  representations)
    5. log π_ref of all answers

Dimension key: N answers, T tokens of one, L layers.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import run_files, trainable
from rlhf_jax.analysis import representations, weights
from rlhf_jax.analysis.answers import heldout_questions, make_answer, make_logprobs
from rlhf_jax.analysis.samples import PhaseSamples, from_rows
from rlhf_jax.analysis.subject import Subject, policy_of
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora


class Evidence(NamedTuple):
    """Everything that was measured.

    Attributes:
      samples: phase -> its answers, in the order of the phases.
      next_logprobs: phase -> [N, T] float32, what the policy of the next phase in
        `samples` says of this phase's answers; none for the last.
      weights: phase -> part of the model -> ‖θ_k − θ_ref‖ / ‖θ_ref‖.
      states: phase -> [L] float64, linear CKA of each layer's states with the
        reference's, on the answers of the first phase.
      skipped: phase -> why it could not be read.
    """

    samples: dict[int, PhaseSamples]
    next_logprobs: dict[int, np.ndarray]
    weights: dict[int, dict[str, float]]
    states: dict[int, np.ndarray]
    skipped: dict[int, str]


def gather(
    subject: Subject,
    phases: Sequence[int],
    *,
    num_samples: int,
    show: Callable[[int], None] = lambda done: None,
) -> Evidence:
    """Asks the policies of some phases and measures them.

    Args:
      subject: the opened run.
      phases: those to look at, in order.
      num_samples: N, answers of each; see `answers.heldout_questions`.
      show: told after each phase how many are done.

    Returns:
      The evidence of the phases that could be read.
    """
    questions = heldout_questions(subject, num_samples)
    answer, logprobs = make_answer(subject), make_logprobs(subject)
    base = _merged(subject, subject.reference)
    found = Evidence({}, {}, {}, {}, {})
    transcripts: dict = {}
    probe = None
    with jax.set_mesh(subject.mesh):
        for done, phase in enumerate(phases, 1):
            try:
                policy = policy_of(subject, phase)
            except UserError as error:
                found.skipped[phase] = str(error)
                continue
            before = next(reversed(found.samples), None)
            samples, transcripts[phase] = answer(policy, phase, questions)
            found.samples[phase] = samples
            if before is not None:
                found.next_logprobs[before] = logprobs(
                    policy, transcripts[before], num_samples
                )
            whole = _merged(subject, policy)
            found.weights[phase] = weights.relative_change(whole, base)
            if probe is None:
                probe = representations.make_probe(
                    subject.model, base, transcripts[phase][0]
                )
            found.states[phase] = representations.similarity(
                subject.model, whole, probe
            )
            show(done)
            del policy, whole  # before the next one is read
        for phase, samples in found.samples.items():
            said = logprobs(subject.reference, transcripts[phase], num_samples)
            found.samples[phase] = samples._replace(ref_logprobs=said)
    return found


def from_files(
    workdir: str | os.PathLike, phases: Sequence[int], num_samples: int
) -> Evidence:
    """What the saved held-out responses tell, where no weights are left.

    A phase with fewer than two of them is left out.
    """
    found = Evidence({}, {}, {}, {}, {})
    for phase in phases:
        rows = run_files.read_responses(workdir, phase)
        samples = from_rows(phase, rows, count=num_samples)
        if samples is None or len(samples.prompts) < 2:
            found.skipped[phase] = (
                f"{workdir} has fewer than 2 scored held-out responses of phase {phase}"
            )
        else:
            found.samples[phase] = samples
    return found


def _merged(subject: Subject, params: Any) -> Any:
    """The weights as one model; what a fresh adapter is compared with has none yet."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    adapted = any(map(lora.is_adapter, paths))
    return trainable.merged(subject.config, params) if adapted else params

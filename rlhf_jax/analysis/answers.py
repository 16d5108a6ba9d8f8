"""The same questions to every policy: prompts, keys and answers of one phase.

Dimension key: N answers, T tokens of one, B rows of a compiled call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import keys, sharding
from rlhf_jax.analysis.samples import PhaseSamples
from rlhf_jax.analysis.subject import Subject
from rlhf_jax.data.prompts import phase_batch
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import judge_scores, name_scores, score_all
from rlhf_jax.rollout.logprobs import Transcript, score_responses
from rlhf_jax.rollout.sampler import Sampler, sampler_of

SPLITS = ("heldout", "train")


class Questions(NamedTuple):
    """What is asked, and what each answer is drawn from.

    Attributes:
      texts: N prompts.
      columns: name -> N values, for the rewards.
      key: a typed key; answer i draws from it and i alone.
      batch: B, rows of one compiled call.
    """

    texts: list[str]
    columns: dict[str, list[Any]]
    key: jax.Array
    batch: int


def heldout_questions(subject: Subject, count: int) -> Questions:
    """The prompts and keys of the run's own held-out evaluation, in its order.

    More than there are prompts ask them again, with keys of their own.
    """
    prompts = subject.prompts["heldout"]
    rows = [i % len(prompts.texts) for i in range(count)]
    return Questions(
        [prompts.texts[i] for i in rows],
        {name: [v[i] for i in rows] for name, v in prompts.columns.items()},
        keys.branch_key(subject.config.seed, keys.HELDOUT, 0),
        _batch(subject, count),
    )


def training_questions(subject: Subject, phase: int, count: int) -> Questions:
    """The first prompts and keys of the rollout that follows a phase.

    With dynamic sampling they are those of its first draw, of which the run keeps the
    groups whose rewards differ.

    Raises:
      UserError: that rollout has fewer answers, or the run has none.
    """
    config = subject.config
    if "learning" in config:
        raise UserError(
            f"{subject.files.workdir} is a run of {config.algorithm}, which learns "
            "from no answers of its own: take split='heldout'"
        )
    group = config.rollout.get("group", 1)
    draws = max(1, config.get("grpo", {}).get("dynamic_sampling", 0))
    taken = phase_batch(
        subject.prompts["train"],
        phase * draws,
        batch_size=config.rollout.prompts,
        seed=config.seed,
    )
    total = len(taken.texts) * group
    if count > total:
        raise UserError(
            f"a rollout of {subject.files.workdir} has {total} answers, fewer than "
            f"the {count} asked for"
        )
    rows = [i // group for i in range(count)]
    return Questions(
        [taken.texts[i] for i in rows],
        {name: [v[i] for i in rows] for name, v in taken.columns.items()},
        keys.branch_key(config.seed, keys.SAMPLING, phase + 1),
        _batch(subject, count),
    )


def make_answer(
    subject: Subject, temperature: float | None = None
) -> Callable[[Any, int, Questions], tuple[PhaseSamples, list[Transcript]]]:
    """Builds `answer(policy, phase, questions)`, one compiled program for all phases.

    It gives the samples, their `ref_logprobs` still None, and the same answers on the
    mesh, for other models to read; the last of those is filled up to B rows.

    Args:
      subject: the opened run.
      temperature: None for the run's own.
    """
    sample = subject.sample if temperature is None else _sampler(subject, temperature)
    logprobs = make_logprobs(subject, temperature)

    def answer(policy, phase, questions):
        count, batch = len(questions.texts), questions.batch
        rollouts = []
        for start in range(0, count, batch):
            index = np.arange(start, start + batch)
            texts = [questions.texts[i % count] for i in index]
            rollouts.append(sample(policy, texts, questions.key, index))
        responses = [text for one in rollouts for text in one.responses][:count]
        transcripts = [rollout.transcript for rollout in rollouts]
        drawn = [
            sharding.to_host((r.samples.tokens, r.samples.mask, r.samples.finished))
            for r in rollouts
        ]
        tokens, mask, finished = (np.concatenate(a)[:count] for a in zip(*drawn))
        pair = questions.texts, responses
        total, parts = score_all(subject.rewards, *pair, **questions.columns)
        scores = name_scores(total, parts)
        scores |= judge_scores(subject.judges, *pair, **questions.columns)
        said = logprobs(policy, transcripts, count)
        samples = PhaseSamples(phase, *pair, tokens, mask, said, None, finished, scores)
        return samples, transcripts

    return answer


def make_logprobs(
    subject: Subject, temperature: float | None = None
) -> Callable[[Any, Sequence[Transcript], int], np.ndarray]:
    """Builds `logprobs(params, transcripts, count) -> [count, T] float32`, nats."""
    own = subject.config.rollout.temperature
    temperature = (own if temperature is None else temperature) or 1.0

    @jax.jit
    def read(params, transcript):
        return score_responses(
            subject.model,
            params,
            transcript,
            temperature=temperature,
            chunk_size=subject.config.get("logprob_chunk", 0) or None,
        ).logprobs

    def logprobs(params, transcripts, count):
        found = [sharding.to_host(read(params, one)) for one in transcripts]
        return np.concatenate(found)[:count]

    return logprobs


def _sampler(subject: Subject, temperature: float) -> Sampler:
    """The run's sampler at another temperature."""
    rollout = subject.config.rollout.copy_and_resolve_references()
    rollout.temperature = float(temperature)
    return sampler_of(rollout, subject.model, subject.tokenizer, subject.mesh)


def _batch(subject: Subject, count: int) -> int:
    """B: a rollout of the run, or fewer, divided evenly over this mesh."""
    shape, rollout = subject.mesh.shape, subject.config.rollout
    ways = shape["data"] * shape["fsdp"]
    most = min(count, rollout.prompts * rollout.get("group", 1))
    return -(-most // ways) * ways

"""The policy on prompts it is never trained on: reward, judges, KL, length."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.data.prompts import Prompts
from rlhf_jax.models.transformer import Model
from rlhf_jax.rewards import Reward, judge_scores, name_scores, score_all
from rlhf_jax.rollout.logprobs import score_responses
from rlhf_jax.rollout.sampler import Sampler, records, text_metrics


def make_heldout(
    model: Model,
    sample: Sampler,
    mesh: Mesh,
    prompts: Prompts,
    *,
    batch: int,
    parts: int = 1,
    seed: int,
    key: jax.Array,
    temperature: float,
    chunk_size: int | None,
    rewards: Sequence[Reward],
    judges: Sequence[Reward],
) -> Callable[[Any, Any], tuple[dict[str, float], list[dict[str, Any]]]]:
    """Builds `evaluate(params, reference) -> (metrics, rows)`.

    The same prompts with the same keys each time, so that two evaluations are paired.

    Args:
      model: the policy's functions.
      sample: from `make_sampler`; its compiled program is shared with training.
      mesh: where the arrays live.
      prompts: the held-out prompts.
      seed: of the run, for the rows.
      batch: rows a call; the last call is filled up with repeated prompts.
      parts: into how many of them a call's rows are cut for the log-probabilities.
      key: the evaluation's own key.
      temperature: the sampler's; 0 compares at temperature 1.
      chunk_size: see `score_responses`.
      rewards: what the policy is trained on.
      judges: rewards it never sees; each is reported alone.

    Returns:
      The function. Metrics are means over the prompts, named `heldout/...`, KL in nats
      a response.
    """

    @jax.jit
    def sequence_kl(params, reference, transcript):
        def speak(params, rows):
            static = {"temperature": temperature or 1.0, "chunk_size": chunk_size}
            return score_responses(model, params, rows, **static).logprobs

        kl_of = lambda rows: (speak(params, rows) - speak(reference, rows)).sum(axis=1)
        return sharding.by_parts(kl_of, transcript, parts)

    def evaluate(params, reference):
        rows, count = [], len(prompts.texts)
        for start in range(0, count, batch):
            index = np.arange(start, start + batch)
            texts = [prompts.texts[i % count] for i in index]
            columns = {
                k: [v[i % count] for i in index] for k, v in prompts.columns.items()
            }
            rollout = sample(params, texts, key, index)
            kl = sharding.to_host(sequence_kl(params, reference, rollout.transcript))
            pairs = (rollout.prompts, rollout.responses)
            total, parts = score_all(rewards, *pairs, **columns)
            scores = name_scores(total, parts)
            scores |= judge_scores(judges, *pairs, **columns)
            rows += records(rollout, scores, kl, split="heldout", seed=seed)
        rows = [row | {"index": i} for i, row in enumerate(rows[:count])]
        return _means(rows), rows

    return evaluate


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    column = lambda name: np.array([row[name] for row in rows], np.float64)
    metrics = {}
    for name in rows[0]:
        if name == "reward" or name.startswith(("judge/", "reward/")):
            metrics[f"heldout/{name}_mean"] = float(column(name).mean())
            metrics[f"heldout/{name}_std"] = float(column(name).std())
    metrics["heldout/kl"] = float(column("kl").mean())
    metrics["heldout/tokens"] = float(column("tokens").mean())
    finished = [row["finish"] == "eos" for row in rows]
    metrics["heldout/finished"] = float(np.mean(finished))
    return metrics | text_metrics("heldout", [row["response"] for row in rows])

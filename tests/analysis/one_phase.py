"""Samples of a phase as no model gave them: made-up texts, surprises and scores."""

import numpy as np

from rlhf_jax.analysis.samples import PhaseSamples

T = 48
LETTERS = np.array(list("etaoinshrdlu"))
WORDS = [
    "".join(np.random.default_rng(seed).choice(LETTERS, 2 + seed % 7))
    for seed in range(400)
]
CHANCES = 1.0 / np.arange(1, len(WORDS) + 1)  # Zipf's law
CHANCES /= CHANCES.sum()


def draw_samples(seed, *, prompts=64, phase=0):
    """Answers to as many prompts, every seed's from one distribution.

    Lengths are geometric, words by Zipf's law, surprises of tokens gamma; each prompt
    has its own mean reward.
    """
    rng = np.random.default_rng([seed, prompts])
    lengths = np.minimum(2 + rng.geometric(1 / 15, prompts), T)
    texts = [" " + " ".join(rng.choice(WORDS, n, p=CHANCES)) for n in lengths]
    marks = rng.choice(["", ".", "!", ",\n"], prompts)
    surprises = rng.gamma(1.2, 2.0, (prompts, T)).astype(np.float32)
    levels = np.random.default_rng(0).normal(size=prompts)
    rewards = (levels + rng.normal(size=prompts)).astype(np.float32)
    return PhaseSamples(
        phase=phase,
        prompts=[f"prompt {number}" for number in range(prompts)],
        responses=[text + mark for text, mark in zip(texts, marks)],
        tokens=np.zeros((prompts, T), np.int32),
        mask=np.arange(T) < lengths[:, None],
        logprobs=-surprises,
        ref_logprobs=-surprises,
        finished=lengths < T,
        scores={
            "reward": rewards,
            "judge/kind": rng.beta(2, 2, prompts).astype(np.float32),
        },
    )

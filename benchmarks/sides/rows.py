"""The rows of the table: what is compared, its unit, and the goal."""

from collections.abc import Mapping
from typing import NamedTuple

from cases import (
    LONG_PROMPT,
    LONGEST,
    NEW,
    PROMPT,
    SHAPES,
    SHORT_NEW,
    TRAIN_ROWS,
    TRAIN_TOKENS,
    forward_flops,
)
from cases import (
    ROWS as SEQUENCES,
)


class Row(NamedTuple):
    """One comparison.

    Attributes:
      case: its name in the workers.
      title: its name in the table.
      goal: the ratio to reach.
      units: how much work a run is, where the workers do not count themselves.
      unit: what work is counted in.
      flops: operations of a run on our side, 0: not counted.
      rounds: how many turns.
      warm: turns before them that do not count.
      compared: whether outputs are compared.
      tolerance: name of an output -> the largest difference, over the largest entry;
        of tokens the share that may differ. 1e-3 unless said.
    """

    case: str
    title: str
    goal: float
    units: float
    unit: str = "tok"
    flops: float = 0.0
    rounds: int = 5
    warm: int = 1
    compared: bool = True
    tolerance: Mapping[str, float] = {}


def generation_flops(model: str, rows: int) -> float:
    """Of a prefill and of every decoding step."""
    shape = SHAPES[model]
    prefill = forward_flops(shape, rows, 0, PROMPT, 1)
    decode = forward_flops(shape, rows, PROMPT, PROMPT + NEW - 1, NEW - 1)
    return prefill + decode


def scoring_flops(model: str, rows: int, tokens: int) -> float:
    """Of a forward pass with all logits."""
    return forward_flops(SHAPES[model], rows, 0, tokens, tokens - 1)


def moved(tolerance: float) -> dict[str, float]:
    """How far apart three updated matrices may be, over the updates' length."""
    names = ("query", "down", "unembedding")
    return {f"moved {name}": tolerance for name in names}


GENERATED = SEQUENCES * NEW
SCORED = SEQUENCES * TRAIN_TOKENS
TRAINED = TRAIN_ROWS * TRAIN_TOKENS
GENERATION = generation_flops("llama", SEQUENCES)
GPT2_GENERATION = generation_flops("gpt2", SEQUENCES)
TRAINING = 3 * scoring_flops("llama", TRAIN_ROWS, TRAIN_TOKENS)
# Means of 4 x 1,024 samples' log-probabilities, and of 4 x 64 lengths.
SAMPLES = {"sampled": 0.02}
LENGTHS = {"mean length": 0.25}
GPT2 = "GPT-2 124M"

ROWS = (
    Row(
        "generate",
        f"generate {SEQUENCES} x ({PROMPT} + {NEW}), compiled",
        *(1.6, GENERATED),
        flops=GENERATION,
        tolerance=SAMPLES,
    ),
    Row(
        "generate_eager",
        "the same, not compiled, as TRL runs it",
        *(1.6, GENERATED),
        flops=GENERATION,
        tolerance=SAMPLES,
    ),
    Row(
        "logprobs",
        f"log-probabilities {SEQUENCES} x {TRAIN_TOKENS}",
        *(1.3, SCORED),
        flops=scoring_flops("llama", SEQUENCES, TRAIN_TOKENS),
    ),
    Row(
        "train",
        f"train step {TRAIN_ROWS} x {TRAIN_TOKENS}, AdamW",
        *(1.0, TRAINED),
        flops=TRAINING,
        tolerance=moved(0.02),
    ),
    Row(
        "train_bf16",
        "the same in bfloat16 compute",
        *(1.0, TRAINED),
        flops=TRAINING,
        tolerance=moved(0.5) | {"losses": 5e-3},
    ),
    Row(
        "grpo",
        f"GRPO step, {SEQUENCES} x ({PROMPT} + {NEW})",
        *(2.0, 1),
        unit="step",
        tolerance={"entropy": 0.05},
    ),
    Row(
        "grpo_lean",
        "the same, our layers recomputed",
        *(2.0, 1),
        unit="step",
        tolerance={"entropy": 0.05},
    ),
    Row(
        "grpo_long",
        f"GRPO step, {SEQUENCES} x ({LONG_PROMPT} + {SHORT_NEW})",
        *(2.0, 1),
        unit="step",
        tolerance={"entropy": 0.05},
    ),
    Row("dpo", "DPO step, 8 pairs x 128", 1.5, 1, "step"),
    Row(
        "dpo_precomputed",
        "DPO step, both with the reference computed before",
        *(1.0, 1),
        unit="step",
    ),
    Row(
        "top_p",
        "generate, top-p 0.9, compiled",
        *(1.9, GENERATED),
        flops=GENERATION,
        tolerance=SAMPLES,
    ),
    Row(
        "top_p_eager",
        "generate, top-p 0.9, not compiled",
        *(1.9, GENERATED),
        flops=GENERATION,
        tolerance=SAMPLES,
    ),
    Row(
        "requests",
        f"64 requests, mean 44, at most {LONGEST}; batches of 16",
        *(4.0, 1),
        tolerance=LENGTHS,
    ),
    Row(
        "requests_paged",
        "the same against continuous batching",
        *(1.5, 1),
        tolerance=LENGTHS,
    ),
    Row(
        "grpo_ragged",
        "GRPO step, ragged",
        *(3.0, 1),
        unit="step",
        warm=30,  # the shapes of packed batches are met
        tolerance={"entropy": 0.1},
    ),
    Row("dpo_ragged", "DPO step, ragged", 2.5, 1, "step"),
    Row("sft", "SFT on ragged texts, TRL not packed", 2.0, 1, compared=False),
    Row("sft_packed", "SFT on ragged texts, both packed", 1.0, 1, compared=False),
    Row("ppo", "PPO step, plain torch", 2.0, 1, "step", compared=False),
    Row(
        "gpt2_generate",
        f"{GPT2} generate",
        *(1.6, GENERATED),
        flops=GPT2_GENERATION,
        rounds=3,
        tolerance=SAMPLES,
    ),
    Row(
        "gpt2_top_p",
        f"{GPT2} top-p 0.9",
        *(1.9, GENERATED),
        flops=GPT2_GENERATION,
        rounds=3,
        tolerance=SAMPLES,
    ),
    Row(
        "gpt2_logprobs",
        f"{GPT2} log-probabilities",
        *(1.4, SCORED),
        flops=scoring_flops("gpt2", SEQUENCES, TRAIN_TOKENS),
        rounds=3,
    ),
)

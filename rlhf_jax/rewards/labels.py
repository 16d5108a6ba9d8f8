"""From a classifier's logits to a reward: which label, on which scale, of which text.

Dimension key: B texts, n labels.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError

WHOLE = "{prompt}{response}"
OUTPUTS = ("logit", "probability", "log_probability", "log_odds")
# How the label that is wanted is called where a config names none.
POSITIVE = ("positive", "pos", "label_1")


class Reading(NamedTuple):
    """How a reward is read from a classifier, as a config says it.

    Attributes:
        label: name or number of a label; None takes the only one, or of two the one
            that is called POSITIVE or LABEL_1.
        output: one of `OUTPUTS`: the label's logit, its probability p, log p or
            log p/(1 - p).
        text: what the classifier reads, "{prompt}" and "{response}" in it replaced.
    """

    label: str | int | None = None
    output: str = "logit"
    text: str = WHOLE


DEFAULT = Reading()


def fill_text(template: str, prompt: str, response: str) -> str:
    """The text that a classifier reads; braces within prompt and response stay."""
    parts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{(prompt|response)\}", lambda found: parts[found[0]], template)


def check_reading(reading: Reading, problem: str | None) -> None:
    """Refuses what no classifier, or not this one, can give.

    Args:
      reading: from a config.
      problem: `problem_type` of the model's config.json, or None.

    Raises:
      UserError: an unknown output, a probability of a regression, or a text without
        the response.
    """
    if reading.output not in OUTPUTS:
        raise UserError(
            f"unknown output {reading.output!r} of a classifier; "
            f"choose from {', '.join(OUTPUTS)}"
        )
    if problem == "regression" and reading.output != "logit":
        raise UserError(
            f"output={reading.output!r} needs probabilities, and this model is a "
            "regression; take output='logit'"
        )
    if not isinstance(reading.text, str) or "{response}" not in reading.text:
        raise UserError(
            f"text={reading.text!r} shows the classifier no response; take "
            f'"{WHOLE}", "{{response}}" or another text with {{response}} in it'
        )


def label_names(hf_config: Mapping[str, Any], count: int) -> list[str]:
    """The labels of a config.json in order; LABEL_0, LABEL_1, ... where it has none."""
    table = hf_config.get("id2label") or {}
    names = {int(key): str(value) for key, value in table.items()}
    return [names.get(index, f"LABEL_{index}") for index in range(count)]


def find_label(labels: Sequence[str], label: str | int | None, who: str) -> int:
    """The number of a label.

    Args:
      labels: all of them, in order.
      label: a name (case counts only where it must), a number, or None for the default
        that `Reading` describes.
      who: the classifier, for the error.

    Raises:
      UserError: no such label, or none given where one must be.
    """
    listed = ", ".join(f"{index}: {name}" for index, name in enumerate(labels))
    if label is None:
        if len(labels) == 1:
            return 0
        hits = [i for i, name in enumerate(labels) if name.lower() in POSITIVE]
        if len(labels) == 2 and len(hits) == 1:
            return hits[0]
        raise UserError(f"{who} has several labels ({listed}): say which by `label`")
    name = str(label)
    exact = [i for i, known in enumerate(labels) if known == name]
    alike = [i for i, known in enumerate(labels) if known.lower() == name.lower()]
    for hits in (exact, alike):
        if len(hits) == 1:
            return hits[0]
    if name.isdecimal() and int(name) < len(labels):
        return int(name)
    raise UserError(f"{who} has no label {label!r}; its labels are {listed}")


def read_scores(
    logits: np.ndarray, index: int, output: str, problem: str | None
) -> np.ndarray:
    """The reward of each text, from the logits of all labels.

    One label, or labels that do not exclude each other: p = σ(z). Else p = softmax(z).

    Args:
      logits: [B, n] float32, z.
      index: of the label.
      output: one of `OUTPUTS`.
      problem: `problem_type` of config.json, or None.

    Returns:
      [B] float32.
    """
    z = logits[:, index].astype(np.float64)
    if output == "logit":
        return z.astype(np.float32)
    odds = z
    if logits.shape[1] > 1 and problem != "multi_label_classification":
        others = np.delete(logits.astype(np.float64), index, axis=1)
        odds = z - np.logaddexp.reduce(others, axis=1)
    log_probability = -np.logaddexp(0, -odds)
    values = {
        "probability": np.exp(log_probability),
        "log_probability": log_probability,
        "log_odds": odds,
    }
    return values[output].astype(np.float32)

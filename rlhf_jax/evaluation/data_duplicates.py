"""What comes twice in a data set: equal texts, near-duplicates, overlaps of splits."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation.data_lengths import Fields
from rlhf_jax.evaluation.data_source import Split, fields_of, usable
from rlhf_jax.evaluation.near_duplicates import Alike, near_duplicates

MAX_COMPARED = 100_000  # texts that near-duplicates are sought among
EXAMPLES = 10
NEAR = 0.8


def exact_duplicates(fields: Fields) -> dict[str, Any]:
    """How many texts came before, by field, and pairs that contradict another pair."""
    whole = list(zip(*fields.values())) if fields else []
    told = {"row": len(whole) - len(set(whole))}
    for name, texts in fields.items():
        texts = [text.strip() for text in texts if text.strip()]
        told[name] = len(texts) - len(set(texts))
    choices = {tuple(row) for row in whole} if "chosen" in fields else set()
    against = sum((p, r, c) in choices for p, c, r in choices if c != r)
    return {"repeated": told, "contradictions": against // 2}


def overlaps(splits: Sequence[Split], kind: str) -> list[dict[str, Any]]:
    """For each two splits, the texts of the second that are also in the first."""
    held = []
    for split in splits:
        rows, _ = usable([split])
        fields = fields_of(rows, kind)
        texts = {name: [t.strip() for t in found] for name, found in fields.items()}
        held.append((split.name, {n: [t for t in v if t] for n, v in texts.items()}))
    told = []
    for at, (first, known) in enumerate(held):
        for second, fields in held[at + 1 :]:
            for name, texts in fields.items():
                seen = set(known.get(name, ()))
                told.append(
                    {
                        "first": first,
                        "second": second,
                        "text": name,
                        "shared": sum(text in seen for text in texts),
                        "of": len(texts),
                    }
                )
    return told


def find_near_duplicates(
    fields: Fields, places: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Near-duplicates among whole rows, and among prompts where those are apart.

    Texts that are equal to the letter are not counted again; of more than MAX_COMPARED
    rows, so many random ones are compared.
    """
    numbers = np.arange(len(places))
    if len(numbers) > MAX_COMPARED:
        rng = np.random.default_rng(seed)
        numbers = np.sort(rng.permutation(numbers)[:MAX_COMPARED])
    groups = {"row": ["\n".join(row) for row in zip(*fields.values())]}
    if "prompt" in fields and len(fields) > 1:
        groups["prompt"] = fields["prompt"]
    told: dict[str, Any] = {"threshold": NEAR}
    for name, texts in groups.items():
        where: dict[str, str] = {}
        for number in numbers:
            where.setdefault(texts[number], places[number])
        told[name] = _compare(where, seed)
    return told


def _compare(where: dict[str, str], seed: int) -> dict[str, Any]:
    """Near-duplicates among distinct texts, each with its place."""
    texts = list(where)
    found = near_duplicates(texts, threshold=NEAR, seed=seed)
    return {
        "compared": len(texts),
        "pairs": len(found),
        "texts": len({number for pair in found for number in pair[:2]}),
        "examples": [
            {
                "similarity": pair.similarity,
                **{
                    side: {"place": where[texts[number]], "text": texts[number]}
                    for side, number in (("first", pair.first), ("second", pair.second))
                },
            }
            for pair in _spread(found)
        ],
    }


def _spread(pairs: Sequence[Alike]) -> list[Alike]:
    """At most EXAMPLES of them, from the most alike to the least."""
    steps = np.linspace(0, len(pairs) - 1, min(EXAMPLES, len(pairs)))
    return [pairs[round(at)] for at in steps]

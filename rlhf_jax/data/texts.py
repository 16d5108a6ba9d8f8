"""Plain texts for language modelling, and prompts with their responses."""

from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import reviews
from rlhf_jax.data.cleaning import AS_IT_IS, Cleaning, Counts, prepare_rows
from rlhf_jax.data.formats import read_completions
from rlhf_jax.data.preferences import preference_pairs
from rlhf_jax.data.rows import Completion
from rlhf_jax.data.splits import open_split, split_rows
from rlhf_jax.data.tables import read_texts
from rlhf_jax.errors import UserError

CHOSEN = "builtin:chosen"


def load_completions(
    source: str,
    *,
    split: str | None,
    tokenizer: Any = None,
    cleaning: Cleaning = AS_IT_IS,
    domains: Sequence[str] = (),
) -> tuple[list[Completion], Counts]:
    """Prompts with the responses to learn, and how many rows were dropped for what.

    Args:
      source: "builtin:reviews"; "builtin:chosen", those of them that people preferred,
        with their first words as prompt; or a file or data set as in `data.tables` with
        columns as in `data.formats`. Of a plain text the prompt is "".
      split: of the built-in sentences and of a hub's data set, the split of that name;
        of a file "train" or "validation" ("heldout" is the same), by the hash of the
        prompt; None is all of a file.
      tokenizer: writes chat messages by its template, and counts tokens.
      cleaning: what is dropped or cut; the built-in sentences are clean already.
      domains: of the built-in sentences; none named is all of them.

    Returns:
      The completions, their prompts as strings, and the counts of `data.cleaning`.

    Raises:
      UserError: whatever is wrong with the source, with file and line.
    """
    if source == reviews.SOURCE:
        texts = load_texts(source, split=split or "train", domains=domains)
        return [Completion("", text) for text in texts], {"kept": len(texts)}
    if source == CHOSEN:
        chosen = _chosen(split or "train", domains or tuple(reviews.FILES))
        return chosen, {"kept": len(chosen)}
    table = open_split(source, split)
    return prepare_rows(read_completions(table), table, split, tokenizer, cleaning)


def _chosen(split: str, domains: Sequence[str]) -> list[Completion]:
    """Once each, though a sentence may be preferred to several others."""
    pairs = preference_pairs(reviews.load_reviews(split, domains=domains))
    return list(dict.fromkeys(Completion(pair.prompt, pair.chosen) for pair in pairs))


def load_texts(source: str, *, split: str, domains: Sequence[str] = ()) -> list[str]:
    """The texts of a source.

    Args:
      source: "builtin:reviews", the human-rated sentences of `data.reviews`; or a file
        or data set as in `data.tables`, with a column "text".
      split: "train", "validation" or "test" of the built-in sentences. Of a file:
        "train" and "validation" are nine tenths and one tenth by a hash of the text.
        Of a hub's data set, its own split of that name, as in `splits.open_split`.
      domains: of the built-in sentences; none named is all of them.

    Raises:
      UserError: whatever is wrong with the source.
    """
    if source == reviews.SOURCE:
        rows = reviews.load_reviews(split, domains=domains or tuple(reviews.FILES))
        return [row.text for row in rows]
    table = open_split(source, split)
    texts = read_texts(table, "text")
    kept = [texts[row] for row in split_rows(table, split, texts)]
    if not kept:
        raise UserError(
            f"no texts are left for {split} of the {len(texts)} rows of {source}: too "
            "few to hold a tenth out"
        )
    return kept

"""Plain texts for language modelling."""

from collections.abc import Sequence

from rlhf_jax.data import reviews
from rlhf_jax.data.tables import is_file, is_heldout, load_table, read_texts
from rlhf_jax.errors import UserError


def load_texts(source: str, *, split: str, domains: Sequence[str] = ()) -> list[str]:
    """The texts of a source.

    Args:
      source: "builtin:reviews", the human-rated sentences of `data.reviews`; or a file
        or data set as in `data.tables`, with a column "text".
      split: "train", "validation" or "test" of the built-in sentences. Of a file:
        "train" and "validation" are nine tenths and one tenth by a hash of the text.
        Of a hub's data set, its own split of that name.
      domains: of the built-in sentences; none named is all of them.

    Raises:
      UserError: whatever is wrong with the source.
    """
    if source == reviews.SOURCE:
        rows = reviews.load_reviews(split, domains=domains or tuple(reviews.FILES))
        return [row.text for row in rows]
    if not is_file(source):
        return read_texts(load_table(source, split=split), "text")
    if split not in ("train", "validation"):
        raise UserError(
            f"{source} is a file and has no split {split!r}: choose from train, "
            "validation"
        )
    texts = read_texts(load_table(source), "text")
    kept = [text for text in texts if is_heldout(text) == (split == "validation")]
    if not kept:
        raise UserError(
            f"no texts are left for {split} of the {len(texts)} rows of {source}: too "
            "few to hold a tenth out"
        )
    return kept

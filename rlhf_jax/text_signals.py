"""Numbers that tell what is odd about a text: repetition, copies, format and script.

Every function is pure, takes any text, an empty one too, and knows no model. Words are
what whitespace separates, in lower case; a script without spaces has few of them, and
there `copied_share` tells what `repeated_share` cannot.

Dimension key: N texts.
"""

import collections
import functools
import string
import unicodedata
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 256  # bytes that are compressed at once for `copied_share`


class CharacterShares(NamedTuple):
    """What a text is made of, each in 0..1 and all 0 for an empty text.

    Attributes:
      letters, digits, punctuation, whitespace: of all characters; punctuation has the
        symbols with it, as "+" or "€".
      non_ascii: of all characters, those beyond the 128 of ASCII.
      upper_case: of the letters.
      line_breaks: of all characters; they are whitespace too.
    """

    letters: float
    digits: float
    punctuation: float
    whitespace: float
    non_ascii: float
    upper_case: float
    line_breaks: float


class ScriptShares(NamedTuple):
    """In which scripts the letters of a text are, each in 0..1; all 0 without letters.

    Attributes:
      latin, cyrillic: as their names say.
      cjk: Chinese, Japanese (kana too) and Korean.
      other: all else, Greek, Arabic, Hebrew, Devanagari, Thai, ...
    """

    latin: float
    cyrillic: float
    cjk: float
    other: float


def repeated_share(text: str, n: int = 3) -> float:
    """Share of the runs of n words that came before: 1 − distinct / all, in 0..1.

    0 where nothing comes twice, or there are no two runs; "good good good good" has
    two runs of three words, and ½.

    References:
      Welleck et al. 2020 (seq-rep-n), equation 10, https://arxiv.org/abs/1908.04319
    """
    runs = _runs(text.lower().split(), n)
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def repeats_itself(text: str) -> bool:
    """Whether three words in a row come twice."""
    return repeated_share(text, 3) > 0


def copied_share(text: str) -> float:
    """What compression saves by copying earlier strings, a share of the bytes in 0..1.

        1 − deflate(text) / huffman(text), the mean over windows of 256 bytes

    The same compressor, with copies and with the frequencies of letters alone. Unlike
    the plain ratio it hardly goes with length: film reviews cut to 40, 160, 640 bytes
    have 0.03, 0.01, 0.01 and one in a hundred above 0.2, 0.07, 0.06; a loop of five
    words 0.4, 0.7, 0.8. An empty text has 0. What comes again after more than a window
    is not seen, so see `repeated_share` too.

    References:
      Shaib et al. 2024, section 2 (the plain ratio), https://arxiv.org/abs/2403.00553
      RFC 1951, https://www.rfc-editor.org/rfc/rfc1951
    """
    data = _utf8(text)
    starts = [*range(0, len(data) - WINDOW, WINDOW), max(0, len(data) - WINDOW)]
    parts = [data[start : start + WINDOW] for start in starts]
    saved = [
        1.0 - _deflated(part) / _deflated(part, zlib.Z_HUFFMAN_ONLY)
        for part in parts
        if part
    ]
    return max(0.0, sum(saved) / len(saved)) if saved else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct runs of n words over all of them (distinct-n), in 0..1; 0 without any.

    Here case counts. More text has less of it, so compare as many words.

    References:
      Li et al. 2016, https://arxiv.org/abs/1510.03055
    """
    runs = [run for text in texts for run in _runs(text.split(), n)]
    return len(set(runs)) / max(1, len(runs))


def distinct_pairs(texts: Sequence[str]) -> float:
    """Distinct neighbouring words over all of them (distinct-2)."""
    return distinct(texts, 2)


def distinct_shares(texts: Sequence[str], n: int = 2) -> np.ndarray:
    """[N] in 0..1: what each text has to do with `distinct` of them all.

    A run of n words that comes c times in all of the texts counts 1/c each time, and a
    text has the mean of its runs, 1 without any. Weighted by the number of runs, the
    mean over texts is `distinct(texts, n)`.
    """
    runs = [_runs(text.split(), n) for text in texts]
    counts = collections.Counter(run for one in runs for run in one)
    return np.array(
        [sum(1.0 / counts[r] for r in one) / len(one) if one else 1.0 for one in runs]
    )


def near_copies(
    texts: Sequence[str], prompts: Sequence[str] | None = None
) -> np.ndarray:
    """[N] in 0..1: how like each text is to the one most like it, to another prompt.

        max over j of |Aᵢ ∩ Aⱼ| / |Aᵢ ∪ Aⱼ|,   A: the runs of three words of a text

    A text of one or two words is one run. Those without a word are like no other. All
    pairs are compared, which is for some hundred texts; of thousands, see
    `evaluation.near_duplicates`.

    Args:
      texts: N texts.
      prompts: what they answer; answers to the same prompt are not compared. None
        where all prompts differ.

    References:
      Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900
    """
    words = [text.lower().split() for text in texts]
    sets = [set(_runs(w, 3) or [tuple(w)] if w else []) for w in words]
    holders = collections.defaultdict(list)
    for number, runs in enumerate(sets):
        for run in runs:
            holders[run].append(number)
    shared = np.zeros((len(texts), len(texts)))
    for numbers in holders.values():
        if len(numbers) > 1:
            shared[np.ix_(numbers, numbers)] += 1.0
    sizes = np.array([len(runs) for runs in sets], np.float64)
    similarity = shared / np.maximum(sizes[:, None] + sizes - shared, 1.0)
    asked = np.arange(len(texts)) if prompts is None else np.array(prompts, object)
    similarity[asked[:, None] == asked] = 0.0
    return similarity.max(axis=1, initial=0.0)


def character_shares(text: str) -> CharacterShares:
    """Shares of letters, digits, punctuation and so on, to see a format change."""
    counts = collections.Counter(text)
    count = lambda holds: sum(c for char, c in counts.items() if holds(char))
    letters, size = count(str.isalpha), max(1, len(text))
    return CharacterShares(
        letters=letters / size,
        digits=count(str.isdigit) / size,
        punctuation=count(_is_punctuation) / size,
        whitespace=count(str.isspace) / size,
        non_ascii=count(lambda char: not char.isascii()) / size,
        upper_case=count(lambda char: char.isalpha() and char.isupper())
        / max(1, letters),
        line_breaks=counts["\n"] / size,
    )


def script_shares(text: str) -> ScriptShares:
    """Shares of the letters by script, to see a change of language.

    A script is told from the letters' names in the Unicode Character Database.

    References:
      https://docs.python.org/3/library/unicodedata.html
    """
    counts = collections.Counter()
    for char, times in collections.Counter(text).items():
        if char.isalpha():
            counts[_script(char)] += times
    total = max(1, counts.total())
    return ScriptShares(*(counts[name] / total for name in ScriptShares._fields))


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n))))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _deflated(data: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> int:
    """Size of the raw compressed stream beyond that of no data."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return len(compressor.compress(data) + compressor.flush()) - 2


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char)[0] in "PS"


@functools.cache
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    for script, starts in {
        "latin": ("LATIN", "FULLWIDTH LATIN", "FEMININE", "MASCULINE"),
        "cyrillic": ("CYRILLIC",),
        "cjk": ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "HALFWIDTH"),
    }.items():
        if name.startswith(starts):
            return script
    return "other"

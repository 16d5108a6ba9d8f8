"""Human-rated sentences: the data set behind the models that ship with the package.

23,700 English sentences from movie reviews, product reviews, newspaper editorials and
tweets, each rated from -4 (extremely negative) to 4 (extremely positive) by a dozen or
more people (some tweets by a hundred). They lie inside the source archive of the Python
package vaderSentiment 3.3.2 (MIT). The archive is downloaded once by package name,
checked against its sha256 and kept in the cache; it is read in memory, never unpacked.

What is done to the texts, and no more (see `clean_text`):
  * HTML entities are decoded, '' and ` become quotation marks, dashes become hyphens;
  * three or more spaces stand where a dash was lost: they become " - " (not in tweets);
  * other runs of spaces are one space, and spaces just inside quotation marks, brackets
    or before a full stop or comma go;
  * product reviews come in lower case: sentence starts and the pronoun I are capitals
    again (names are not restored).
A text that comes twice in a domain is kept once. The means are computed here from the
ratings: those printed beside the tweets do not agree with them.

References:
  C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
  Analysis of Social Media Text", ICWSM 2014.
  https://ojs.aaai.org/index.php/ICWSM/article/view/14550
"""

import hashlib
import html
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_jax.errors import UserError

SOURCE = "builtin:reviews"  # how a config names this data set

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweet": "tweets",
}
SPLITS = ("train", "validation", "test")


class Review(NamedTuple):
    """One sentence and what people thought of it."""

    text: str
    domain: str  # movie | product | news | tweet
    ratings: tuple[int, ...]  # one a rater, -4..4
    rating: float  # their mean


def load_reviews(
    split: str = "train",
    *,
    domains: Sequence[str] = tuple(FILES),
    archive: str | os.PathLike | None = None,
) -> list[Review]:
    """The rated sentences of one split, in the order of the source files.

    Args:
      split: "train", "validation" or "test": 80, 10 and 10 % by a hash of the text.
      domains: which of "movie", "product", "news", "tweet".
      archive: a copy of the source archive, if it should not be downloaded.

    Raises:
      UserError: unknown split or domain, no network, or an archive that is not the one.
    """
    _check_choice("split", split, SPLITS)
    for domain in domains:
        _check_choice("domain", domain, FILES)
    rows = read_archive(archive or fetch_archive())
    return [r for r in rows if r.domain in domains and split_of(r.text) == split]


def split_of(text: str) -> str:
    """The split of a text, from its letters and digits alone (case does not count)."""
    letters = re.sub(r"[^0-9a-z]+", "", text.casefold())
    bucket = int(hashlib.sha256(letters.encode()).hexdigest()[:8], 16) % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


def clean_text(text: str, domain: str) -> str:
    """Mend what the collection did to a sentence; the module's docstring lists it."""
    text = html.unescape(html.unescape(text))  # some are escaped twice
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    text = text.replace("''", '"').replace("`", "'").replace("–", "-")
    if domain != "tweet":  # tweets hold emoticons, of which these rules would eat parts
        text = re.sub(r"(?<=\S) {3,}(?=\S)", " - ", text)
        text = re.sub(r'(^|[\s(])" ([^"]*?) "(?=\W|$)', r'\1"\2"', text)
        text = re.sub(r"(^|[\s(])' ([^']*?) '(?=\W|$)", r"\1'\2'", text)
        text = re.sub(r"([(\[])\s+", r"\1", text)
        text = re.sub(r"\s+([)\]])", r"\1", text)
        text = re.sub(r"(?<=[\w)\]])\s+([.,;:!?])(?=\s|$)", r"\1", text)
    text = re.sub(r"\s+", " ", text).strip()
    if domain == "product":
        text = re.sub(
            r"(^\W*|[.!?] [\"'(]?)([a-z])", lambda m: m[1] + m[2].upper(), text
        )
        text = re.sub(r"\bi\b(?=[\s,.!?;)\"]|'(?:m|ve|d|ll)\b|$)", "I", text)
    return text


def cache_dir() -> pathlib.Path:
    """Where downloads are kept: $RLHF_JAX_CACHE, or ~/.cache/rlhf_jax."""
    path = os.environ.get("RLHF_JAX_CACHE") or "~/.cache/rlhf_jax"
    return pathlib.Path(path).expanduser()


def fetch_archive() -> pathlib.Path:
    """The cached source archive, downloaded through pip if it is not there yet."""
    cached = cache_dir() / ARCHIVE
    if cached.exists() and _sha256(cached) == SHA256:
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            said = _pip_download(folder)
            fresh = pathlib.Path(folder) / ARCHIVE
            if not fresh.exists() or _sha256(fresh) != SHA256:
                raise UserError(
                    f"the rated sentences could not be downloaded ({said}): connect "
                    "once, or on another machine run `pip download --no-deps "
                    f"--no-binary :all: {REQUIREMENT}` and put {ARCHIVE} into "
                    f"{cached.parent}"
                )
            os.replace(fresh, cached)
    except OSError as error:
        raise UserError(
            f"the cache folder {cached.parent} cannot be written ({error}): set "
            "RLHF_JAX_CACHE to a folder that can"
        ) from error
    return cached


def _pip_download(folder: str) -> str:
    """Ask pip for the source archive; the result is what it said last, if it failed."""
    # With the hash in the requirement pip refuses another archive before it runs
    # anything in it (it asks every source archive for its metadata).
    wanted = pathlib.Path(folder) / "requirements.txt"
    wanted.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", "utf-8")
    options = ["--no-deps", "--require-hashes", "--no-binary", "vaderSentiment"]
    options += ["--retries", "1", "--dest", folder, "--requirement", str(wanted)]
    command = [sys.executable, "-m", "pip", "download", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    said = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in said if "ERROR" in line] or said
    return (errors or ["pip gave no reason"])[-1]


def read_archive(path: str | os.PathLike) -> list[Review]:
    """Every rated sentence in the source archive, cleaned; nothing goes to disk."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: expected a copy of {ARCHIVE}")
    if _sha256(path) != SHA256:
        raise UserError(
            f"{path} is not the expected {ARCHIVE}: its sha256 is {_sha256(path)}, "
            f"not {SHA256}"
        )
    with tarfile.open(path) as outer:
        inner_bytes = outer.extractfile(INNER).read()
    rows, seen = [], set()
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for domain, stem in FILES.items():
            texts = _read_table(inner, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            rated = _read_table(inner, f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt")
            ratings = {fields[0]: tuple(json.loads(fields[3])) for fields in rated}
            for name, _, text in texts:
                text = clean_text(text, domain)
                if text and (domain, text) not in seen:
                    seen.add((domain, text))
                    mean = sum(ratings[name]) / len(ratings[name])
                    rows.append(Review(text, domain, ratings[name], mean))
    return rows


def _read_table(archive: tarfile.TarFile, member: str) -> list[list[str]]:
    """The fields of a tab-separated member: CRLF, perhaps with a byte-order mark."""
    text = archive.extractfile(member).read().decode("utf-8-sig")
    return [line.split("\t") for line in text.split("\r\n") if line]


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")

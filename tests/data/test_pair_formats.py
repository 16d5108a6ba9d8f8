"""Pairs of every format, by hand, and what is said of bad ones."""

import collections
import gzip
import json
import os

import pytest

from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.formats import read_pairs
from rlhf_jax.data.rows import Dropped, Pair
from rlhf_jax.data.tables import Table, load_table
from rlhf_jax.errors import UserError

ASK = {"role": "user", "content": "Why?"}
ASKED = (Message("user", "Why?"),)
SO = {"role": "assistant", "content": "So."}
NO = {"role": "assistant", "content": "No."}
PKU = {
    "prompt": "Why?",
    "response_0": "Zero.",
    "response_1": "One.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}


def table(tmp_path, *rows):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_table(str(path))


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (
            {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
            Pair("Why?", " So.", " No."),
        ),
        ({"chosen": "Good.", "rejected": "Bad."}, Pair("", "Good.", "Bad.")),
        # what a file of ours may say besides
        (
            {
                "prompt": "Why?",
                "chosen": "So.",
                "rejected": "No.",
                "probability": 0.75,
                "domain": "news",
                "chosen_safe": True,
                "rejected_safe": None,
                "margin": 2,
            },
            Pair("Why?", "So.", "No.", 0.75, "news", True, None, 2.0),
        ),
        # UltraFeedback as pairs: both sides hold the question
        (
            {
                "prompt": "Why?",
                "prompt_id": "1f",
                "chosen": [ASK, SO],
                "rejected": [ASK, NO],
                "messages": [ASK, SO],
                "score_chosen": 8.0,
            },
            Pair(ASKED, "So.", "No."),
        ),
        ({"chosen": [ASK, SO], "rejected": [ASK, NO]}, Pair(ASKED, "So.", "No.")),
        (
            {"prompt": [ASK], "chosen": [SO], "rejected": [NO]},
            Pair(ASKED, "So.", "No."),
        ),
        (
            {"prompt": "Why?", "chosen": [SO], "rejected": [NO]},
            Pair(ASKED, "So.", "No."),
        ),
        (
            {"prompt": [ASK], "chosen": "So.", "rejected": "No."},
            Pair(ASKED, "So.", "No."),
        ),
        (
            {"chosen": [ASK, SO, ASK, SO], "rejected": [ASK, NO, ASK, NO]},
            Dropped(
                (
                    *ASKED,
                    Message("assistant", "So."),
                    *ASKED,
                    Message("assistant", "So."),
                ),
                "turns differ before the last",
            ),
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: So.",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: S",
            },
            Pair(
                "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " So.", " S"
            ),
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b",
                "rejected": "\n\nHuman: b\n\nAssistant: b",
            },
            Dropped("\n\nHuman: a\n\nAssistant: b", "no shared prompt"),
        ),
    ],
)
def test_preferences(tmp_path, row, pair):
    assert read_pairs(table(tmp_path, row)) == [pair]


def test_pku_by_the_better_or_the_safer(tmp_path):
    better = Pair("Why?", "One.", "Zero.", 1.0, "", False, True)
    safer = Pair("Why?", "Zero.", "One.", 1.0, "", True, False)
    rows = table(tmp_path, PKU)
    assert read_pairs(rows) == read_pairs(rows, "better") == [better]
    assert read_pairs(rows, "safer") == [safer]
    bare = {k: v for k, v in PKU.items() if "safe" not in k}
    assert read_pairs(table(tmp_path, bare)) == [Pair("Why?", "One.", "Zero.")]
    with pytest.raises(UserError, match="has no column 'safer_response_id' for pref"):
        read_pairs(table(tmp_path, bare), "safer")


def test_pku_from_a_csv_file(tmp_path):
    path = tmp_path / "a.csv"
    words = {True: "True", False: "False"}
    values = [words.get(v, v) if isinstance(v, bool) else v for v in PKU.values()]
    path.write_text(",".join(PKU) + "\n" + ",".join(map(str, values)) + "\n")
    assert read_pairs(load_table(str(path)), "safer") == [
        Pair("Why?", "Zero.", "One.", 1.0, "", True, False)
    ]


def test_ultrafeedback_takes_the_best_and_the_worst(tmp_path):
    def rated(*scores, key="overall_score"):
        items = [
            {"response": f"r{i}", key: s, "model": "m"} for i, s in enumerate(scores)
        ]
        return {"instruction": "Why?", "completions": items}

    rows = table(
        tmp_path,
        rated(5, 8.5, 2, 7),
        rated(4, 4, 4),
        rated(4),
        rated(1, 3, key="fine-grained_score"),
    )
    assert read_pairs(rows) == [
        Pair("Why?", "r1", "r2"),
        Dropped("Why?", "tie"),
        Dropped("Why?", "fewer than two responses"),
        Pair("Why?", "r1", "r0"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
                "rejected": "\n\nHuman: a\n\nAssistant: d",
            },
            "'chosen' does not end with a turn of the assistant: end it with",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: d", "rejected": "\n\nHuman: a"},
            "'rejected' does not end with a turn of the assistant: end it with",
        ),
        ({"chosen": "x", "rejected": [ASK, SO]}, "should be of one kind, two strings"),
        ({"chosen": ["x"], "rejected": "y"}, "'chosen' should .* not a list of str"),
        (
            {"chosen": "x", "rejected": "y", "probability": 1.5},
            "'probability' should be a number from 0 to 1, not 1.5",
        ),
        (
            {"chosen": "x", "rejected": "y", "margin": "wide"},
            "'margin' should be a number, not 'wide'",
        ),
        (
            {"chosen": "x", "rejected": "y", "chosen_safe": "maybe"},
            "'chosen_safe' should be true or false, not 'maybe'",
        ),
        (
            PKU | {"better_response_id": 2},
            "'better_response_id' should be 0 or 1, not 2",
        ),
        (PKU | {"response_1": None}, "'response_1' should be a string, not NoneType"),
        ({"instruction": "x", "completions": "y"}, "'completions' should be a list"),
        (
            {"instruction": "x", "completions": [{"response": "y"}]},
            "each of 'completions' should be an object with a response",
        ),
    ],
)
def test_bad_rows_name_the_line(tmp_path, row, message):
    with pytest.raises(UserError, match=r"a\.jsonl line 1.*" + message) as caught:
        read_pairs(table(tmp_path, row))
    assert "\n" not in str(caught.value)


def test_a_row_of_a_hub_cannot_be_mended_and_is_dropped():
    sides = {
        "chosen": ["\n\nHuman: a\n\nAssistant: b\n\nHuman: c"],
        "rejected": ["\n\nHuman: a\n\nAssistant: d"],
    }
    hub = Table("hf:some/dialogues", tuple(sides), 1, sides.__getitem__, str)
    (row,) = read_pairs(hub)
    assert row == Dropped(sides["chosen"][0], "no assistant turn at the end")


def test_preferences_that_are_not_there(tmp_path):
    plain = table(tmp_path, {"chosen": "x", "rejected": "y"})
    with pytest.raises(UserError, match=r"unknown preference 'nicer' .* better, safer"):
        read_pairs(plain, "nicer")
    with pytest.raises(UserError, match="does not say which response is safer: only"):
        read_pairs(plain, "safer")


def test_the_real_rows_of_pku():
    path = os.environ.get("RLHF_JAX_PKU")
    if not path:
        pytest.skip("RLHF_JAX_PKU does not name a file of PKU-SafeRLHF")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        raw = [json.loads(line) for line in file]
    for preference in ("better", "safer"):
        pairs = read_pairs(load_table(path), preference)
        for row, pair in zip(raw, pairs, strict=True):
            side = row[f"{preference}_response_id"]
            assert pair.chosen == row[f"response_{side}"]
            assert pair.rejected == row[f"response_{1 - side}"]
            assert pair.chosen_safe == row[f"is_response_{side}_safe"]
            assert pair.rejected_safe == row[f"is_response_{1 - side}_safe"]
        found = collections.Counter((p.chosen_safe, p.rejected_safe) for p in pairs)
        # whoever is safer is never unsafe beside a safe response
        assert (found[False, True] == 0) == (preference == "safer")

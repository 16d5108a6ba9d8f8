"""Lengths, turns and the bias to longer responses, by hand."""

import numpy as np
import pytest

from rlhf_jax.data.dialogues import Message
from rlhf_jax.data.rows import Completion, Pair
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.evaluation.data_lengths import (
    count_turns,
    length_bias,
    measure,
    summarise_lengths,
    summarise_turns,
)


def test_lengths_by_hand():
    fields = {"prompt": ["ab cd", ""], "chosen": ["e", "f g h"], "rejected": ["ij", ""]}
    lengths = measure(fields)
    assert lengths["characters"]["prompt"].tolist() == [5, 0]
    assert lengths["words"]["chosen"].tolist() == [1, 3]
    # prompt + the longer response: 5 + 2, 0 + 5
    assert lengths["characters"]["whole"].tolist() == [7, 5]


def test_tokens_beyond_the_limit_count_the_eos():
    tokenizer = train_tokenizer(["a"], 258)  # bytes alone
    lengths = measure({"text": ["abc", "abcd", "abcde"]}, tokenizer)
    assert lengths["tokens"]["text"].tolist() == [3, 4, 5]
    told = summarise_lengths(lengths, max_tokens=4)
    # 4 + EOS and 5 + EOS are more than 4
    assert told["tokens"]["text"]["beyond"] == pytest.approx(2 / 3)
    assert told["tokens"]["text"]["median"] == 4
    assert told["tokens"]["text"]["max"] == 5
    assert "beyond" not in told["words"]["text"]


def test_turns_of_dialogues():
    hh = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert count_turns(Pair(hh, " d", " e")) == 4
    assert count_turns(Completion(hh, hh), "prompts") == 3
    guanaco = "### Human: a### Assistant:"
    assert count_turns(Completion(guanaco, " b")) == 2
    chat = (Message("system", "s"), Message("user", "a"))
    assert count_turns(Completion(chat, "b")) == 2
    assert count_turns(Completion(chat, "a"), "prompts") == 1
    assert count_turns(Completion("a question", "b")) == 0


def test_distribution_of_turns_leaves_out_what_is_no_dialogue():
    told = summarise_turns(np.array([0, 2, 2, 6]))
    assert told["dialogues"] == 3
    assert told["mean"] == pytest.approx(10 / 3)
    assert told["rows_by_turns"] == {2: 2, 6: 1}
    assert summarise_turns(np.array([0])) == {"dialogues": 0}


def test_length_bias_by_hand():
    told = length_bias(np.array([5, 4, 3, 9]), np.array([1, 6, 3, 3]))
    # differences 4, -2, 0, 6: two longer, one shorter, one equal (half a hit)
    assert (told["chosen_longer"], told["chosen_shorter"], told["equal"]) == (2, 1, 1)
    assert told["longer_wins"]["value"] == pytest.approx(2.5 / 4)
    assert told["longer_wins"]["low"] < 2.5 / 4 < told["longer_wins"]["high"]
    assert told["mean_difference"]["value"] == 2
    # standard error sqrt((4 + 16 + 4 + 16) / 3) / 2 = 1.826
    assert told["mean_difference"]["high"] == pytest.approx(2 + 1.96 * 1.8257, abs=1e-3)
    expected = np.corrcoef([1, 1, 1, 1, 0, 0, 0, 0], [5, 4, 3, 9, 1, 6, 3, 3])[0, 1]
    assert told["point_biserial"] == pytest.approx(expected)


def test_what_one_pair_cannot_tell_is_none():
    told = length_bias(np.array([2]), np.array([2]))
    assert told["point_biserial"] is None
    assert told["mean_difference"] == {"value": 0, "low": None, "high": None}

"""Training and held-out prompts of one config."""

import pytest
from ml_collections import ConfigDict

from rlhf_jax.data.prompts import load_both
from rlhf_jax.data.tokenizer import train_tokenizer
from rlhf_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five"] * 3, 300)


def data(train, heldout):
    return ConfigDict(
        {
            "train": str(train),
            "heldout": str(heldout),
            "column": "",
            "extra_columns": (),
            "prefix_words": 0,
            "prefix_tokens": 0,
            "limit": 0,
            "heldout_limit": 0,
            "seed": 0,
        }
    )


def write(path, count, word):
    path.write_text("".join(f"{word} {i}\n" for i in range(count)))
    return path


def test_two_files_are_taken_whole(tmp_path, tokenizer):
    config = data(
        write(tmp_path / "a.txt", 30, "one"), write(tmp_path / "b.txt", 20, "two")
    )
    train, heldout = load_both(config, tokenizer, prompt_tokens=16)
    assert sorted(train.texts) == sorted(f"one {i}" for i in range(30))
    assert sorted(heldout.texts) == sorted(f"two {i}" for i in range(20))


def test_one_file_for_both_is_split(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", 200, "one")
    train, heldout = load_both(data(path, path), tokenizer, prompt_tokens=16)
    assert not set(train.texts) & set(heldout.texts)
    assert len(train.texts) + len(heldout.texts) == 200
    assert 8 <= len(heldout.texts) <= 35  # a tenth, by hash


def test_the_only_split_of_a_data_set_is_cut_in_two(tmp_path, tokenizer, hub_cache):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.txt", 200, "one")
    # however it is spelled
    config = data(folder, f"hf:{folder}")
    train, heldout = load_both(config, tokenizer, prompt_tokens=16)
    assert not set(train.texts) & set(heldout.texts)
    assert len(train.texts) + len(heldout.texts) == 200
    assert 8 <= len(heldout.texts) <= 35


def test_two_data_sets_of_one_split_are_taken_whole(tmp_path, tokenizer, hub_cache):
    for name, count in (("a", 30), ("b", 20)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.txt", count, name)
    config = data(tmp_path / "a", tmp_path / "b")
    train, heldout = load_both(config, tokenizer, prompt_tokens=16)
    assert sorted(train.texts) == sorted(f"a {i}" for i in range(30))
    assert sorted(heldout.texts) == sorted(f"b {i}" for i in range(20))


def test_two_data_sets_keep_their_splits(tmp_path, tokenizer, hub_cache):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.txt", 30, f"{name} train")
        write(tmp_path / name / "test.txt", 20, f"{name} test")
    config = data(tmp_path / "a", tmp_path / "b")
    train, heldout = load_both(config, tokenizer, prompt_tokens=16)
    assert sorted(train.texts) == sorted(f"a train {i}" for i in range(30))
    assert sorted(heldout.texts) == sorted(f"b test {i}" for i in range(20))


def test_every_prompt_is_measured_before_the_run(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one\n" + "two three four five " * 10 + "\n")
    other = write(tmp_path / "b.txt", 3, "one")
    with pytest.raises(UserError, match=r"a\.txt line 2: .* more than the 16 allowed"):
        load_both(data(path, other), tokenizer, prompt_tokens=16)


def test_the_template_of_the_config_is_around_both(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", 200, "one")
    config = data(path, path)
    plain = load_both(config, tokenizer, prompt_tokens=16)
    config["prompt_template"] = "Q: {prompt} A:"
    for part, bare in zip(load_both(config, tokenizer, prompt_tokens=16), plain):
        assert part.texts == [f"Q: {text} A:" for text in bare.texts]

"""Tokenizers: training, saving, padding, and what happens without pad or eos."""

import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers

from rlhf_jax.data import tokenizer as tk
from rlhf_jax.errors import UserError

TEXTS = [
    "The film is good, really good; nothing in it disappoints.",
    "The camera is not good at all, and the battery dies quickly!",
] * 5
SIZE = 320  # enough that each word of TEXTS is one token


@pytest.fixture(scope="module")
def tokenizer():
    return tk.train_tokenizer(TEXTS, SIZE)


def test_round_trip_of_any_text(tokenizer):
    texts = ["The film", "  two  spaces \n", "héllo 😀 .", "a , b", ""]
    ids = tk.encode_texts(tokenizer, texts)
    assert ids[-1] == []
    assert tokenizer.batch_decode(ids) == texts
    assert tk.encode_texts(tokenizer, []) == []


def test_training_is_deterministic_and_has_the_size(tokenizer):
    assert len(tokenizer) == SIZE
    assert tk.train_tokenizer(TEXTS, SIZE).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(UserError, match="at least 258"):
        tk.train_tokenizer(TEXTS, 257)


def test_saved_and_loaded_without_torch(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = tk.load_tokenizer(tmp_path)
    assert tk.encode_texts(loaded, TEXTS) == tk.encode_texts(tokenizer, TEXTS)
    assert tk.special_tokens(loaded) == (0, 1, "")
    assert loaded.bos_token_id is None
    code = (
        "import sys, transformers;"
        f"t = transformers.AutoTokenizer.from_pretrained({str(tmp_path)!r});"
        "assert 'torch' not in sys.modules; print(t('The film').input_ids)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == str(tokenizer("The film").input_ids)


def test_importing_the_module_loads_no_heavy_library():
    code = (
        "import sys, rlhf_jax.data.tokenizer, rlhf_jax.data.reviews,"
        "rlhf_jax.data.prompts;"
        "bad = {'transformers', 'tokenizers', 'datasets', 'tensorflow_datasets',"
        "'grain', 'jax'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_are_left_padded(tokenizer):
    tokens, mask = tk.encode_prompts(tokenizer, ["The film", "The"], length=4)
    the, film = tk.encode_texts(tokenizer, ["The film"])[0]
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert tokens.tolist() == [[0, 0, the, film], [0, 0, 0, the]]
    assert mask.tolist() == [[False, False, True, True], [False, False, False, True]]


def test_the_empty_prompt_is_a_start_token(tokenizer):
    tokens, mask = tk.encode_prompts(tokenizer, [""], length=2)
    assert (tokens.tolist(), mask.tolist()) == ([[0, 1]], [[False, True]])  # eos


def test_a_tokenizer_with_bos_keeps_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tk.train_tokenizer([*TEXTS, "<s>"], SIZE)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    the, film = tk.encode_texts(tokenizer, ["The film"])[0]
    prompts = ["The film", ""]
    tokens, mask = tk.encode_prompts(tokenizer, prompts, length=3)
    assert tokens.tolist() == [[bos, the, film], [0, 0, bos]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    short, _ = tk.encode_prompts(
        tokenizer, ["The film"], length=2, overflow="truncate_left"
    )
    assert short.tolist() == [[bos, film]]


def test_long_prompts(tokenizer):
    with pytest.raises(UserError, match=r"prompt 1 has \d+ tokens, more than the 2 al"):
        tk.encode_prompts(tokenizer, ["The", "The film is good"], length=2)
    ids = tk.encode_texts(tokenizer, ["The film is good"])[0]
    tokens, mask = tk.encode_prompts(
        tokenizer, ["The film is good"], length=2, overflow="truncate_left"
    )
    assert tokens.tolist() == [ids[-2:]] and mask.all()
    with pytest.raises(UserError, match="unknown overflow 'drop'"):
        tk.encode_prompts(tokenizer, ["The"], length=2, overflow="drop")


def test_decode_stops_at_eos_and_ignores_masked_tokens(tokenizer):
    the, film = tk.encode_texts(tokenizer, ["The film"])[0]
    tokens = [[the, film, 1, film], [the, film, film, film], [1, the, the, the]]
    mask = [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    before = [the, film, 1]
    got = tk.decode_responses(tokenizer, before, tokens, mask)
    assert got == ["The film", "The", ""]
    with pytest.raises(ValueError, match=r"both be \[B, T\]"):
        tk.decode_responses(tokenizer, before, tokens, [[1, 1]])


def test_a_response_keeps_the_space_that_llama_2_strips_from_a_text():
    words = ["<s>", "</s>", "\u2581The", "\u2581film", "\u2581is", "\u2581good", "ly"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, words[1])
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    stripping = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    assert stripping.decode([4, 5]) == "is good"
    tokens, mask = [[4, 5, 1], [6, 5, 1], [2, 3, 1]], [[1, 1, 1]] * 3
    got = tk.decode_responses(stripping, [3, 5, 0], tokens, mask)
    assert got == [" is good", "ly good", "The film"]


def test_a_character_that_prompt_and_response_share(tokenizer):
    """The prompt ends inside of it: the response is decoded by itself."""
    first, *rest = tk.encode_texts(tokenizer, ["\u00e9"])[0]
    tokens = [[*rest, 1]]
    got = tk.decode_responses(tokenizer, [first], tokens, np.ones_like(tokens))
    assert got == ["\ufffd"]


def test_without_pad_the_filler_is_eos(tmp_path):
    tokenizer = tk.train_tokenizer(TEXTS, SIZE)
    tokenizer.pad_token = None
    special = tk.special_tokens(tokenizer)
    assert (special.pad, special.eos) == (1, 1)
    assert "no pad token" in special.note and "lengths" in special.note
    tokens, mask = tk.encode_prompts(tokenizer, ["The<|eos|>", "The"], length=3)
    # A real eos inside a prompt stays real, a filler eos does not become so.
    assert tokens[0, 2] == 1 and mask.tolist() == [[0, 1, 1], [0, 0, 1]]
    tokenizer.pad_token = "<|eos|>"
    assert "pad token is its eos" in tk.special_tokens(tokenizer).note


def test_without_eos_there_is_an_error():
    tokenizer = tk.train_tokenizer(TEXTS, SIZE)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        tk.special_tokens(tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "that is not a directory"),
        ("./no_such_folder", "that is not a directory"),
        ("nobody/no-such-model", "neither a directory nor a model"),
    ],
)
def test_a_missing_tokenizer(source, message):
    with pytest.raises(UserError, match=message):
        tk.load_tokenizer(source)


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer could be read"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ broken")
    with pytest.raises(UserError, match="no tokenizer could be read"):
        tk.load_tokenizer(tmp_path)

"""A mesh, and a directory with a tiny reward model and a tokenizer that fits it."""

import pathlib
import shutil

import pytest

from rlhf_jax import sharding

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "families" / "llama_score"
TEXTS = [
    "The film is good, really good; nothing in it disappoints.",
    "The camera is not good at all, and the battery dies quickly!",
]


@pytest.fixture(scope="session")
def mesh():
    return sharding.make_mesh()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # The fixture's vocabulary of 96 has no room for all bytes: only those of TEXTS.
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=96, special_tokens=list(special.values()), show_progress=False
        ),
    )
    folder = tmp_path_factory.mktemp("reward") / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, folder / name)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return folder

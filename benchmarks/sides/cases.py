"""Sizes and data of the cases, the same for both sides; no torch and no jax in here.

Dimension key: B sequences, P prompt tokens, N new tokens, T tokens, V vocabulary.
"""

from typing import NamedTuple

import numpy as np

PROMPT, NEW = 32, 64  # tokens
LONG_PROMPT, SHORT_NEW = 256, 32  # as in summaries
ROWS, GROUP = 16, 8  # sequences of a batch, responses to one prompt
TRAIN_ROWS, TRAIN_TOKENS = 8, 128
REQUESTS, LONGEST = 64, 128  # of the case with lengths of all kinds


class Shape(NamedTuple):
    """What is needed to count the operations of a decoder-only transformer."""

    V: int
    D: int
    layers: int
    d_ff: int
    gated: bool

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers, without embeddings."""
        mlp = (3 if self.gated else 2) * self.D * self.d_ff
        return self.layers * (4 * self.D**2 + mlp)


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pad_token_id": 8190,
    "eos_token_id": 8191,
    "bos_token_id": None,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 50256,
    "eos_token_id": 50256,
    "bos_token_id": 50256,
}
SHAPES = {
    "llama": Shape(8192, 384, 6, 1024, gated=True),
    "gpt2": Shape(50257, 768, 12, 3072, gated=False),
}
# Mean lengths of responses, by the chance of EOS at each token; none: never.
MODELS = {"fixed": None, "ragged": 24, "requests": 44, "gpt2": None}


def tokens(name: str, *shape: int) -> np.ndarray:
    """Random token ids without the special ones, the same for each name."""
    seed = int.from_bytes(name.encode()[:8], "little")
    return np.random.default_rng(seed).integers(0, 8000, shape, np.int64)


def lengths(name: str, count: int, mean: float, longest: int) -> np.ndarray:
    """Exponential lengths of at least 8 tokens, the same for each name."""
    seed = int.from_bytes(name.encode()[:8], "little")
    drawn = np.random.default_rng(seed).exponential(mean - 8, count)
    return np.minimum(8 + drawn.astype(np.int64), longest)


def as_text(ids: np.ndarray) -> str:
    """Token ids as words of the benchmark's tokenizer."""
    return " ".join(f"w{i}" for i in ids)


def prompt_texts(length: int = PROMPT) -> list[str]:
    """Prompts of equal length for the trainers that sample."""
    return [as_text(row) for row in tokens("prompts", 4 * ROWS, length)]


def pair_texts(*, ragged: bool) -> list[tuple[str, str, str]]:
    """8 triples of prompt, chosen and rejected; with EOS at most 128 tokens."""
    longest = TRAIN_TOKENS - PROMPT - 1
    sides = lengths("pairs", 16, 44, longest) if ragged else np.full(16, longest)
    ids = tokens("pairs", 8, PROMPT + 2 * longest)
    texts = []
    for row, (chosen, rejected) in zip(ids, sides.reshape(8, 2), strict=True):
        prompt, one, other = np.split(row, [PROMPT, PROMPT + longest])
        parts = prompt, one[:chosen], other[:rejected]
        texts.append((as_text(parts[0]), *(" " + as_text(x) for x in parts[1:])))
    return texts


def ragged_texts() -> list[np.ndarray]:
    """512 texts of 8 to 127 tokens, 44 on average."""
    sizes = lengths("texts", 512, 44, TRAIN_TOKENS - 1)
    ids = tokens("texts", 512, TRAIN_TOKENS)
    return [row[:size] for row, size in zip(ids, sizes, strict=True)]


def even_share(words: str) -> float:
    """The reward: the share of even tokens of a response."""
    found = [int(word[1:]) for word in words.split() if word[0] == "w"]
    return sum(n % 2 == 0 for n in found) / max(len(found), 1)


def write_tokenizer(folder: str) -> None:
    """A tokenizer of words w0 to w8189, one a token, beside the model in `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(8190)} | {"<pad>": 8190, "</s>": 8191}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def forward_flops(shape: Shape, rows: int, start: int, stop: int, logits: int) -> float:
    """Operations of a forward pass over tokens `start` to `stop` of each row.

    Args:
      shape: of the model.
      rows: B.
      start: tokens that are in the cache already.
      stop: tokens of a row after the pass.
      logits: of how many tokens of a row the logits are computed.
    """
    attended = (stop * (stop + 1) - start * (start + 1)) / 2
    linear = 2 * shape.layer_weights * (stop - start)
    attention = 4 * shape.layers * shape.D * attended
    return rows * (linear + attention + 2 * shape.V * shape.D * logits)

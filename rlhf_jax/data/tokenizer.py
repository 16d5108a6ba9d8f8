"""Text to tokens and back; pad and eos are explicit.

Two rules hold everywhere. A mask comes from lengths, never from comparing tokens with
the pad id: many tokenizers have no pad, or use eos for it. A sequence ends with eos, so
a tokenizer without one cannot be trained with.

Dimension key: B texts, P prompt length, T response length.
"""

import functools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError, first_line

PAD = "<|pad|>"
EOS = "<|eos|>"


class SpecialTokens(NamedTuple):
    """The two ids that the rest of the package needs, and how they were found."""

    pad: int  # filler only: what is real is told by masks
    eos: int
    note: str  # "" or one sentence for the person who started the run


def load_tokenizer(source: str | os.PathLike) -> Any:
    """A transformers tokenizer from a directory or a hub id; runs no code from there.

    Raises:
      UserError: nothing there, no tokenizer in it, or a hub that cannot be reached.
    """
    auto = _import_transformers().AutoTokenizer
    source = os.fspath(source)
    path = pathlib.Path(source).expanduser()
    local = path.is_dir()
    if not local and (path.exists() or source.startswith((".", "/", "~"))):
        raise UserError(f"no tokenizer at {source}: that is not a directory")
    try:
        tokenizer = auto.from_pretrained(
            str(path) if local else source, trust_remote_code=False
        )
    except Exception as error:  # the hub, its cache and the files each raise their own
        if local:
            raise UserError(
                f"no tokenizer could be read from {source}: expected tokenizer.json or "
                f"the files of a transformers tokenizer ({first_line(error)})"
            ) from error
        raise UserError(
            f"no tokenizer for {source!r}: it is neither a directory nor a model that "
            "the Hugging Face hub gave (check the spelling, or the network, or give a "
            f"local directory; {first_line(error)})"
        ) from error
    # transformers makes an empty one for BERT and its kin from config.json alone
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"no tokenizer could be read from {source}: expected tokenizer.json or a "
            "vocabulary beside config.json"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, with distinct pad and eos, no bos.

    Any text can be encoded and comes back unchanged. `save_pretrained` writes it so
    that `AutoTokenizer.from_pretrained` reads it. The same texts give the same result.

    Args:
      texts: what to train on, in a fixed order.
      vocab_size: all tokens, the 256 bytes and the two special ones among them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(bytes_) + 2:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: the 256 bytes and 2 special "
            f"tokens need at least {len(bytes_) + 2}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(bytes_),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def check_vocabulary(tokenizer: Any, vocab_size: int, who: str) -> None:
    """Raises a `UserError` where the tokenizer has tokens that `who` does not know."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has {len(tokenizer)} tokens,"
            f" {who} only {vocab_size}: they are no pair"
        )


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """The pad and eos ids of a tokenizer; without a pad, eos fills the empty slots.

    Raises:
      UserError: the tokenizer has no eos.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no "
            "end-of-sequence token, so no response could ever end: set `eos_token` in "
            "its tokenizer_config.json"
        )
    if pad is None:
        note = f"the tokenizer has no pad token: empty slots hold eos ({eos})"
        return SpecialTokens(eos, eos, note + "; masks come from lengths")
    if pad == eos:
        note = f"the tokenizer's pad token is its eos ({eos})"
        return SpecialTokens(pad, eos, note + "; masks come from lengths")
    return SpecialTokens(pad, eos, "")


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text and nothing else: no bos, no eos, no truncation."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # lengths are checked by whoever knows the limit
    )
    return [[int(i) for i in ids] for ids in encoded["input_ids"]]


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    length: int,
    overflow: str = "error",
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts: every row's last token stands in the last column.

    A tokenizer that starts its texts with bos keeps doing so. The empty prompt is bos
    alone, or eos where there is no bos (as GPT-2 was trained).

    Args:
      tokenizer: a transformers tokenizer.
      prompts: B texts.
      length: P, columns of the result.
      overflow: what to do with a longer prompt: "error", or "truncate_left", which
        drops its beginning (bos, if there is one, stays).

    Returns:
      tokens [B, P] int32 and mask [B, P] bool, True where a token is real.

    Raises:
      UserError: a prompt longer than `length`, or an unknown `overflow`.
    """
    if overflow not in ("error", "truncate_left"):
        raise UserError(
            f"unknown overflow {overflow!r}: choose from error, truncate_left"
        )
    special = special_tokens(tokenizer)
    start = start_tokens(tokenizer)
    fallback = start or [special.eos]
    tokens = np.full((len(prompts), length), special.pad, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, ids in enumerate(encode_texts(tokenizer, prompts)):
        ids = start + ids or fallback
        if len(ids) > length:
            if overflow == "error":
                raise UserError(
                    f"prompt {row} has {len(ids)} tokens, more than the {length} "
                    f"allowed: {prompts[row][:60]!r} (raise the prompt length, or "
                    "truncate)"
                )
            tail = length - len(start)
            ids = start[:length] + (ids[-tail:] if tail > 0 else [])
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return tokens, mask


def decode_responses(
    tokenizer: Any, before: np.ndarray, tokens: np.ndarray, mask: np.ndarray
) -> list[str]:
    """The text of each response up to its first eos, as it goes on from its prompt.

    Llama 2 and its kin drop the space at the start of a text, so a response is decoded
    together with the token before it, whose own text is then taken off.

    Args:
      tokenizer: a transformers tokenizer.
      before: [B] int, the last token of each prompt.
      tokens: [B, T] int.
      mask: [B, T] bool, True where a token is real.

    Returns:
      B texts; prompt + response is the whole.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask).astype(bool)
    if tokens.shape != mask.shape or tokens.ndim != 2:
        raise ValueError(
            f"tokens and mask must both be [B, T], got {tokens.shape} and {mask.shape}"
        )
    eos = special_tokens(tokenizer).eos
    rows = []
    for row, real in zip(tokens, mask):
        ids = row[real].tolist()
        rows.append(ids[: ids.index(eos)] if eos in ids else ids)
    decode = functools.partial(
        tokenizer.batch_decode,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    heads = [[int(last)] for last in np.asarray(before)]
    alone, head_texts = decode(rows), decode(heads)
    joined = decode([head + row for head, row in zip(heads, rows)])
    return [
        # A character cut in two by the prompt's end is whole only in the joined text.
        whole[len(head) :] if whole.startswith(head) else text
        for head, whole, text in zip(head_texts, joined, alone)
    ]


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: [bos] for Llama, [] for GPT-2."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [int(bos)] if bos is not None and ids[:1] == [bos] else []


def _import_transformers():
    """Transformers, without its advice at import to install PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers

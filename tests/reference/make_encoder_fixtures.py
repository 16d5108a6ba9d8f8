"""Make tests/fixtures/encoders: tiny random classifiers and their logits.

Run in an environment with torch and transformers (neither is needed by the tests):

    python tests/reference/make_encoder_fixtures.py

Each folder is what transformers' save_pretrained writes, float32, with logits.npz:
    tokens [3, T]   mask [3, T]   right-padded rows of T, 7 and 3 tokens
    types  [3, T]                 token types (BERT only, zero elsewhere)
    logits [3, n] float32, each row alone, without padding
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers as hf

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "encoders"
T, V, D = 12, 99, 32
LENGTHS = (T, 7, 3)
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
DISTILBERT = {
    "vocab_size": V,
    "dim": D,
    "hidden_dim": 37,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
MOODS = {0: "NEGATIVE", 1: "POSITIVE"}
ENCODERS = {
    "bert": (
        hf.BertForSequenceClassification,
        hf.BertConfig(
            **SIZES,
            id2label={0: "anger", 1: "joy", 2: "fear"},
            problem_type="multi_label_classification",
        ),
    ),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(**DISTILBERT, id2label=MOODS),
    ),
    # its pad id is not 1, so that positions start where few checkpoints have them
    "roberta": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**SIZES, pad_token_id=3, hidden_act="gelu_new", num_labels=1),
    ),
    "xlm-roberta": (
        hf.XLMRobertaForSequenceClassification,
        hf.XLMRobertaConfig(
            **SIZES,
            type_vocab_size=1,
            id2label={0: "LABEL_0", 1: "LABEL_1"},
            problem_type="single_label_classification",
        ),
    ),
}


def rows(name, pad, generator):
    """Right-padded tokens, mask and token types."""
    tokens = torch.full((len(LENGTHS), T), pad)
    types, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.randint(5, V, (length,), generator=generator)
        mask[row, :length] = 1
        if name == "bert":
            types[row, length // 2 : length] = 1
    return tokens, mask, types


def make(name, architecture, config, seed):
    """Write one folder."""
    torch.manual_seed(seed)
    model = architecture(config).float().eval()
    with torch.no_grad():
        for leaf, values in model.named_parameters():
            if values.ndim == 1:  # norms and biases: away from ones and zeros
                values.add_(0.3 * torch.randn_like(values))
            elif "classifier" in leaf:
                values.normal_(std=0.3 if name == "distilbert" else 1.0)
            elif "pooler" in leaf:
                values.mul_(0.5)  # or tanh hides what comes before it
    pad = config.pad_token_id
    tokens, mask, types = rows(name, pad, torch.Generator().manual_seed(seed))
    logits = []
    for row, length in enumerate(LENGTHS):
        inputs = {"input_ids": tokens[row : row + 1, :length]}
        if name == "bert":
            inputs["token_type_ids"] = types[row : row + 1, :length]
        with torch.no_grad():
            logits.append(model(**inputs).logits[0].numpy())
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(
        folder / "logits.npz",
        tokens=tokens.numpy().astype(np.int32),
        mask=mask.numpy().astype(np.int32),
        types=types.numpy().astype(np.int32),
        logits=np.stack(logits),
    )
    spread = float(np.std(logits))
    print(f"{name:12s} {np.shape(logits)} spread {spread:.2f}", file=sys.stderr)


if __name__ == "__main__":
    for seed, (name, (architecture, config)) in enumerate(ENCODERS.items()):
        make(name, architecture, config, seed)

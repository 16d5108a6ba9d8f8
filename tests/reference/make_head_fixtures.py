"""Make tests/fixtures/heads.npz: scores of sequence heads on the families' trunks.

Run in an environment with torch and transformers (neither is needed by the tests):

    python tests/reference/make_head_fixtures.py

The trunks are those of tests/fixtures/families, so that only heads and scores are kept:
    weight [n, D]   bias [n]                   n = 3
    <family>        [2, n] transformers' ...ForSequenceClassification, head `weight`,
                    on the right-padded batch of the family's logits.npz
    beaver_*        [2, 1] a LlamaModel (families/llama_score) under a torch.nn.Linear
                    of the first row of `weight`, at the last real token, normalised as
                    safe-rlhf does: (s - mean) / (std + 1e-8) for rewards, s / (std +
                    1e-8) for costs
    mean, var       [1] of the normaliser
"""

import json
import pathlib

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
FAMILIES = {
    "gpt2": hf.GPT2ForSequenceClassification,
    "gpt_neox": hf.GPTNeoXForSequenceClassification,
    "llama": hf.LlamaForSequenceClassification,
    "mistral": hf.MistralForSequenceClassification,
    "qwen2": hf.Qwen2ForSequenceClassification,
    "qwen3": hf.Qwen3ForSequenceClassification,
    "gemma": hf.GemmaForSequenceClassification,
    "gemma2": hf.Gemma2ForSequenceClassification,
    "gemma3_text": hf.Gemma3TextForSequenceClassification,
}
UNEMBED = ("lm_head.weight", "embed_out.weight")
D, N = 32, 3


def batch(folder):
    """The right-padded rows of a family's fixture."""
    with np.load(folder / "logits.npz") as arrays:
        return [torch.tensor(arrays[k][1]).long() for k in ("tokens", "mask")]


def classify(name, weight):
    """Logits [2, n] of transformers' classifier on a family's trunk."""
    folder = FIXTURES / "families" / name
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": {str(i): f"L{i}" for i in range(N)}}
    config = hf.AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"
    model = FAMILIES[name](config).eval()
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if k not in UNEMBED}
    # strict: the names of the trunk and of the head are those of transformers
    model.load_state_dict(tensors | {"score.weight": torch.tensor(weight)})
    tokens, mask = batch(folder)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits.numpy()


def beaver(weight, bias, mean, var):
    """End scores [2, 1] under a linear head, for each way to normalise them."""
    folder = FIXTURES / "families" / "llama_score"
    trunk = hf.LlamaModel(hf.LlamaConfig.from_pretrained(folder)).eval()
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    trunk.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items()})
    tokens, mask = batch(folder)
    scores = {}
    with torch.no_grad():
        hidden = trunk(input_ids=tokens, attention_mask=mask).last_hidden_state
        end = hidden[torch.arange(2), mask.sum(1) - 1]
        for name, with_bias in (("plain", False), ("bias", True)):
            head = torch.nn.Linear(D, 1, bias=with_bias)
            head.weight.copy_(torch.tensor(weight[:1]))
            if with_bias:
                head.bias.copy_(torch.tensor(bias[:1]))
            scores[f"beaver_{name}"] = head(end).numpy()
    std = np.sqrt(var) + 1e-8
    plain, biased = scores["beaver_plain"], scores["beaver_bias"]
    scores["beaver_reward"] = (plain - mean) / std
    scores["beaver_cost"] = biased / std
    return scores


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(N, D)).astype(np.float32)
    bias = generator.normal(size=N).astype(np.float32)
    mean, var = np.float32([1.7]), np.float32([6.2])
    arrays = {name: classify(name, weight) for name in FAMILIES}
    arrays |= beaver(weight, bias, mean, var)
    np.savez_compressed(
        FIXTURES / "heads.npz", weight=weight, bias=bias, mean=mean, var=var, **arrays
    )

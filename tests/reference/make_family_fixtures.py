"""Make tests/fixtures/families: tiny random checkpoints and their logits.

Run in an environment with torch and transformers (neither is needed by the tests):

    python tests/reference/make_family_fixtures.py

Each folder is what transformers' save_pretrained writes, float32, with logits.npz:
    tokens [2, 2, T]   mask [2, 2, T]   left-padded batch, right-padded batch
    logits [2, 2, T, V] float32, zero under the mask    (scores [2, 2] for classifiers)
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers as hf

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "families"
T, V, D = 12, 96, 32
PAD = 0
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def sizes(*without, **more):
    """SIZES with some left out and some added."""
    return {k: v for k, v in SIZES.items() if k not in without} | more


GPT2 = {
    "vocab_size": V,
    "n_embd": D,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 36,
    "n_positions": 64,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = sizes("num_key_value_heads")
GEMMA3 = sizes(
    num_hidden_layers=3,
    head_dim=16,
    sliding_window=5,
    query_pre_attn_scalar=24,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {
            "rope_type": "linear",
            "factor": 4.0,
            "rope_theta": 10_000.0,
        },
    },
)
FAMILIES = {
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2)),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**NEOX)),
    "gpt_neox_sequential": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(
            **(NEOX | {"num_hidden_layers": 1}),
            use_parallel_residual=False,
            attention_bias=False,
        ),
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "llama3": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(
            **SIZES,
            rope_parameters=LLAMA3,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
            head_dim=12,
        ),
    ),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES, head_dim=16)),
    "gemma": (
        hf.GemmaForCausalLM,
        hf.GemmaConfig(**(SIZES | {"num_key_value_heads": 1}), head_dim=16),
    ),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(
            **SIZES,
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3_text": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GEMMA3)),
    "llama_score": (
        hf.LlamaForSequenceClassification,
        hf.LlamaConfig(**sizes(num_hidden_layers=1), num_labels=1),
    ),
    "gpt2_score": (
        hf.GPT2ForSequenceClassification,
        hf.GPT2Config(**(GPT2 | {"n_layer": 1}), num_labels=1),
    ),
}


def batches(generator):
    """The same two texts of 12 and 7 tokens, left-padded and right-padded."""
    texts = [torch.randint(3, V, (n,), generator=generator) for n in (T, 7)]
    tokens = torch.full((2, 2, T), PAD)
    mask = torch.zeros((2, 2, T), dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[0, row, T - len(text) :] = text
        mask[0, row, T - len(text) :] = 1
        tokens[1, row, : len(text)] = text
        mask[1, row, : len(text)] = 1
    return tokens, mask


def make(name, architecture, config, seed):
    """Write one folder."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"  # the softcap is ignored elsewhere
    model = architecture(config).float().eval()
    with torch.no_grad():
        for leaf, values in model.named_parameters():
            if values.ndim == 1:  # norms and biases: away from ones and zeros
                values.add_(0.3 * torch.randn_like(values))
            elif "score" in leaf:
                values.normal_()
    tokens, mask = batches(torch.Generator().manual_seed(seed))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    results = []
    for side in range(2):
        with torch.no_grad():
            output = model(
                input_ids=tokens[side],
                attention_mask=mask[side],
                position_ids=positions[side],
            ).logits
        real = mask[side][..., None]
        output = output * real if output.ndim == 3 else output[:, 0]
        results.append(output.float().numpy())
    kind = "logits" if results[0].ndim == 3 else "scores"
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    arrays = {kind: np.stack(results)}
    np.savez_compressed(
        folder / "logits.npz",
        tokens=tokens.numpy().astype(np.int32),
        mask=mask.numpy().astype(np.int32),
        **arrays,
    )
    spread = float(results[0].std())
    print(f"{name:20s} {kind} spread {spread:.2f}", file=sys.stderr)


if __name__ == "__main__":
    for seed, (name, (architecture, config)) in enumerate(FAMILIES.items()):
        make(name, architecture, config, seed)

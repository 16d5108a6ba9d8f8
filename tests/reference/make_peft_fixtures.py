"""Make tests/fixtures/peft, and show that PEFT reads what we write.

In an environment with torch, transformers and peft (none is needed by the tests):

    python tests/reference/make_peft_fixtures.py make

Each folder is what PEFT's save_pretrained writes for a random adapter (A and B) on the
model of that name in tests/fixtures/families, and the output in a float32 array:
    logits.npz: logits [2, T, V] of the left-padded batch of the family's logits.npz,
                zero under the mask; scores [2] of the classifiers

The other way round, in the project's environment and then in that of PEFT:

    python tests/reference/make_peft_fixtures.py write <out>
    python tests/reference/make_peft_fixtures.py compare <out>

The first saves a random adapter of ours on every linear layer (and once more on query
and value alone), the merged model, and our outputs. The second asserts that PEFT's
outputs with the adapter are ours to 1e-4, and that its merge_and_unload is our merged
model to 1e-6. It prints the largest differences.
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
OUT, FAMILIES = FIXTURES / "peft", FIXTURES / "families"
EVERY = {"target_modules": "all-linear", "r": 3, "lora_alpha": 6}
# Between them: patterns, rank-stabilised scales, some layers only, a regular
# expression, the default targets of PEFT, a score head.
ADAPTERS = {
    "gpt2": {
        "target_modules": ["c_attn", "attn.c_proj", "c_fc"],
        "r": 2,
        "fan_in_fan_out": True,
    },
    "gpt2_score": {"r": 2, "fan_in_fan_out": True},
    "gpt_neox": EVERY | {"use_rslora": True, "lora_alpha": 3},
    "gpt_neox_sequential": {"target_modules": ["query_key_value"], "r": 4},
    "llama": EVERY
    | {
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5},
        "alpha_pattern": {"down_proj": 1, r"layers\.\d\.mlp\.up_proj": 9},
    },
    "llama_score": {"target_modules": ["q_proj", "v_proj"], "r": 2},
    "llama3": {"target_modules": r".*\.(k|o)_proj", "r": 2},
    "mistral": {
        "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"],
        "r": 3,
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "qwen2": {"r": 2},
    "qwen3": EVERY,
    "gemma": EVERY | {"r": 2},
    "gemma2": EVERY | {"r": 2, "lora_dropout": 0.1},
    "gemma3_text": EVERY | {"r": 1, "lora_alpha": 2},
}


def batch(name):
    """The left-padded rows of a family's fixture, and which are real."""
    with np.load(FAMILIES / name / "logits.npz") as arrays:
        return arrays["tokens"][0], arrays["mask"][0]


def load(folder, name):
    """transformers' model of a folder, and PEFT's word for its task."""
    import transformers as hf

    score = name.endswith("_score")
    auto = hf.AutoModelForSequenceClassification if score else hf.AutoModelForCausalLM
    model = auto.from_pretrained(folder, attn_implementation="eager")
    return model.float().eval(), "SEQ_CLS" if score else "CAUSAL_LM"


def outputs(model, name):
    """Logits [2, T, V], zero under the mask, or scores [2], as a NumPy array."""
    import torch

    tokens, mask = (torch.tensor(x).long() for x in batch(name))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions
        ).logits.float()
    return (found * mask[..., None] if found.ndim == 3 else found[:, 0]).numpy()


def make(name, settings, seed):
    """Write one folder with PEFT."""
    import peft
    import torch

    model, task = load(FAMILIES / name, name)
    before = outputs(model, name)
    torch.manual_seed(seed)
    settings = {"task_type": task, "init_lora_weights": False, **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for leaf, values in model.named_parameters():
            if "lora_" in leaf:
                values.normal_(0.0, 0.3)
            elif "score.modules_to_save" in leaf:
                values.normal_()
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # In the order of the alphabet: PEFT keeps a set, and another one on every run.
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config |= {"base_model_name_or_path": f"tests/fixtures/families/{name}"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "adapter_model.safetensors").chmod(0o644)
    after = outputs(model, name)
    kind = "scores" if task == "SEQ_CLS" else "logits"
    np.savez_compressed(folder / "logits.npz", **{kind: after})
    print(f"{name:20s} moved by {np.abs(after - before).max():.2f}", flush=True)


def write(out, name, targets):
    """Save an adapter of ours, the merged model and our outputs."""
    import jax

    from rlhf_jax.models import lora
    from rlhf_jax.models.peft_files import save_adapter
    from rlhf_jax.models.pretrained import load_pretrained, save_pretrained
    from rlhf_jax.models.transformer import make_model
    from rlhf_jax.trees import join

    found = load_pretrained(FAMILIES / name, head=None)
    linears = {x for p in ("attention", "mlp") for x in found.params["layers"][p]}
    targets = [x for x in lora.LINEARS if x in linears and x in (targets or linears)]
    rank, alpha = 3, 5
    fresh = lora.init_adapter(
        found.params, jax.random.key(1), rank=rank, targets=targets
    )
    rng = np.random.default_rng(2)
    adapter = jax.tree.map(lambda x: x + np.float32(rng.normal(0, 0.3, x.shape)), fresh)
    model = make_model(dataclasses.replace(found.config, lora_scale=alpha / rank))
    tokens, mask = batch(name)
    params = found.params
    if name.endswith("_score"):
        head = {"kernel": np.float32(rng.normal(size=params["score"]["kernel"].shape))}
        params = params | {"score": head}
    hidden = jax.jit(model.apply)(join(params, adapter), tokens, mask)
    merged = lora.merge(params, adapter, scale=alpha / rank)
    if name.endswith("_score"):
        adapter = adapter | {"score": params["score"]}
        result = np.asarray(model.score(params, hidden))[:, -1]  # left padding
    else:
        result = np.asarray(model.unembed(params, hidden)) * mask[..., None]
    save_adapter(
        out / "adapter",
        adapter,
        found.config,
        found.hf_config,
        rank=rank,
        alpha=alpha,
        dropout=0.1,
        targets=targets,
        base_model=str(FAMILIES / name),
    )
    save_pretrained(out / "merged", found._replace(params=merged))
    np.savez(out / "outputs.npz", ours=result)


def compare(out, name):
    """PEFT with our adapter against us: (logits, merged weights), largest differences.

    Raises:
        AssertionError: one of them is too large, or PEFT had something to say about
            the adapter's names.
    """
    import warnings

    import peft

    with np.load(out / "outputs.npz") as arrays:
        ours = arrays["ours"]
    base, _ = load(FAMILIES / name, name)
    before, weights = outputs(base, name), dict(base.state_dict())
    weights = {key: value.clone() for key, value in weights.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft")
        model = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    found = outputs(model, name)
    assert largest(found, before) > 0.1, name
    assert largest(found, ours) < 1e-4, (name, largest(found, ours))
    merged = model.merge_and_unload().state_dict()
    ours_merged = load(out / "merged", name)[0].state_dict()
    assert merged.keys() == ours_merged.keys()
    assert max(largest(merged[key], weights[key]) for key in merged) > 0.1, name
    apart = max(largest(merged[key], ours_merged[key]) for key in merged)
    assert apart < 1e-6, (name, apart)
    return largest(found, ours), apart


def largest(a, b):
    """The largest difference of two arrays."""
    return abs(a - b).max().item()


def main(action, *out):
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        if action == "make":
            make(name, settings, seed)
            continue
        for kind, targets in [("all", None), ("two", ["query", "value"])]:
            place = pathlib.Path(*out) / f"{name}-{kind}"
            if action == "write":
                write(place, name, targets)
            else:
                logits, weights = compare(place, name)
                words = f"logits {logits:.1e} merged weights {weights:.1e}"
                print(f"{place.name:25s} {words}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

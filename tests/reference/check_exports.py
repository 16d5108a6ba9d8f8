"""Show that transformers loads what save_pretrained writes, with equal logits.

In the project's environment (every fixture, and optionally a model directory):

    python tests/reference/check_exports.py write <out> [<model directory>]

then in an environment with torch and transformers:

    python tests/reference/check_exports.py compare <out>
"""

import json
import pathlib
import sys

FAMILIES = pathlib.Path(__file__).parents[1] / "fixtures" / "families"


def write(out, models):
    """Export each model three times: float32, sharded float32, bfloat16."""
    from rlhf_jax.models.pretrained import load_pretrained, save_pretrained

    for directory in models:
        found = load_pretrained(directory, head=None)
        size = 20_000 if directory.parent == FAMILIES else 200_000_000
        place = out / directory.name
        save_pretrained(place / "float32", found)
        save_pretrained(place / "sharded", found, max_shard_bytes=size)
        save_pretrained(place / "bfloat16", found, dtype="bfloat16")
        (place / "source.json").write_text(json.dumps(str(directory.resolve())))


def compare(out):
    """Print the largest difference of logits between source and export."""
    import torch
    import transformers as hf

    def logits(directory):
        config = hf.AutoConfig.from_pretrained(directory)
        classifies = "SequenceClassification" in config.architectures[0]
        auto = hf.AutoModelForSequenceClassification if classifies else None
        model, info = (auto or hf.AutoModelForCausalLM).from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
        left = {k: v for k, v in info.items() if v}
        tokens = torch.arange(3, 43).reshape(2, 20) % 90 + 3
        with torch.no_grad():
            return model.float()(tokens).logits, left

    for place in sorted(out.iterdir()):
        source, _ = logits(json.loads((place / "source.json").read_text()))
        words = []
        for kind in ("float32", "sharded", "bfloat16"):
            got, left = logits(place / kind)
            difference = (got - source).abs().max().item()
            words.append(f"{kind} {difference:.1e} {left or ''}")
        print(f"{place.name:20s}", *words, flush=True)


if __name__ == "__main__":
    action, out, *more = sys.argv[1:]
    if action == "write":
        models = [*sorted(FAMILIES.iterdir()), *map(pathlib.Path, more)]
        write(pathlib.Path(out), models)
    else:
        compare(pathlib.Path(out))

"""What transformers computes with SmolLM2-135M-Instruct, for test_real_checkpoint.py.

    python tests/reference/make_smollm2_fixture.py <directory of smollm2_from_gguf.py>

Needs torch and transformers. Writes tests/fixtures/smollm2.npz:
    tokens [2, B, T]   mask [2, B, T]     left-padded and right-padded texts
    logits [2, B, 16, 64] float32         at `rows` (positions) and `columns` (ids)
    top [2, B, 16]                        the greedy choice at `rows`
    rows [2, B, 16]   columns [64]
    prompts [B, P]   prompt_mask [B, P]   greedy [B, 32]    left-padded; `generate`
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "smollm2.npz"
TEXTS = [
    "The museum was almost empty when we came in out of the rain, and the guard at the "
    "door told us that the best paintings were on the third floor.",
    "In 1969 two people walked on the moon.",
    "Water boils at a lower temperature in the mountains because the air is thinner.",
]
PROMPTS = ["The capital of France is", "Once upon a time", "This film was"]


def main(directory):
    """Write the fixture."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).float().eval()
    arrays = {k: [] for k in ("tokens", "mask", "logits", "top", "rows")}
    columns = np.random.default_rng(0).choice(model.config.vocab_size, 64, False)
    columns.sort()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        mask = batch["attention_mask"]
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(**batch, position_ids=positions).logits.numpy()
        real = [np.flatnonzero(row) for row in mask.numpy()]
        rows = np.stack([r[np.linspace(0, len(r) - 1, 16).astype(int)] for r in real])
        picked = np.take_along_axis(logits, rows[:, :, None], 1)
        arrays["tokens"].append(batch["input_ids"].numpy())
        arrays["mask"].append(mask.numpy())
        arrays["rows"].append(rows)
        arrays["logits"].append(picked[..., columns])
        arrays["top"].append(picked.argmax(-1))
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    model.generation_config.eos_token_id = None  # go on past the end of the text
    with torch.no_grad():
        greedy = model.generate(**batch, max_new_tokens=32, do_sample=False)
    prompts = batch["input_ids"].numpy()
    arrays |= {
        "columns": columns,
        "prompts": prompts,
        "prompt_mask": batch["attention_mask"].numpy(),
        "greedy": greedy.numpy()[:, prompts.shape[1] :],
    }
    for text in tokenizer.batch_decode(greedy, skip_special_tokens=True):
        print(repr(text))
    arrays = {k: np.stack(v) for k, v in arrays.items()}
    arrays = {k: v.astype(v.dtype.kind + "4") for k, v in arrays.items()}
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])

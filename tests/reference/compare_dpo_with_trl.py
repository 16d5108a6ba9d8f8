"""Make tests/fixtures/dpo_step.npz: optimizer steps of TRL's DPOTrainer.

Run in an environment with torch, transformers and trl 1.16 (the tests need none):

    python tests/reference/compare_dpo_with_trl.py

From the checkpoint tests/fixtures/families/llama and texts of made-up words, TRL
encodes the pairs and takes two Adam steps on all of them, in float32, for each case.

The file holds (B pairs, T tokens, S steps):
    words, texts          JSON: the vocabulary, and rows of prompt, chosen, rejected
    settings              JSON: keys are paths in configs/dpo.py, for all cases
    cases                 JSON: a case's name -> settings of its own
    unembedding_scale     the reference is the policy with this factor on it
    input_ids, attention_mask, completion_mask [2·B, T]   TRL's batch, chosen first
    <case>/losses [S]     before each step
    <case>/weights/*      after the last, under HF's names
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama"
OUT = FIXTURES / "dpo_step.npz"
STEPS, UNEMBEDDING_SCALE = 2, 0.8
WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(93))]
LENGTHS = [(3, 5, 2), (1, 1, 4), (4, 3, 3), (2, 6, 1)]  # prompt, chosen, rejected
SETTINGS = {
    "dpo.beta": 0.3,
    "optimizer.lr": 1e-3,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-5,
    "optimizer.clip_norm": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}
CASES = {
    "sigmoid": {"dpo.loss_type": "sigmoid"},
    "mix": {
        "dpo.loss_types": {"sigmoid": 0.8, "bco_pair": 0.2},
        "dpo.rpo_alpha": 0.5,
        "dpo.ld_alpha": 0.4,
    },
    "weighted": {
        "dpo.loss_type": "ipo",
        "dpo.divergence": "js",
        "dpo.wpo": True,
    },
}
# The same in TRL's words. Its "sft" is the mean over tokens of `rpo_alpha`.
TRL = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "mix": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 0.5],
        "ld_alpha": 0.4,
    },
    "weighted": {
        "loss_type": ["ipo"],
        "f_divergence_type": "js_divergence",
        "use_weighting": True,
    },
}


class Recorder(DPOTrainer):
    """TRL's trainer, which keeps its batches and losses."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = loss.detach().item()
        self.seen = [*getattr(self, "seen", []), (inputs, value)]
        return loss


def make_tokenizer():
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def draw_texts():
    rng = np.random.default_rng(0)
    say = lambda n: " ".join(f"w{i}" for i in rng.integers(0, 93, n))
    return [
        {"prompt": say(p), "chosen": " " + say(c), "rejected": " " + say(r)}
        for p, c, r in LENGTHS
    ]


def load():
    return hf.AutoModelForCausalLM.from_pretrained(
        SOURCE, dtype=torch.float32, attn_implementation="eager"
    )


def train(texts, options):
    """TRL's batch, its losses, and the weights after the last step."""
    policy, reference = load(), load()
    with torch.no_grad():
        reference.lm_head.weight.mul_(UNEMBEDDING_SCALE)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            beta=SETTINGS["dpo.beta"],
            learning_rate=SETTINGS["optimizer.lr"],
            adam_beta1=SETTINGS["optimizer.b1"],
            adam_beta2=SETTINGS["optimizer.b2"],
            adam_epsilon=SETTINGS["optimizer.eps"],
            weight_decay=0.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            per_device_train_batch_size=len(texts),
            max_steps=STEPS,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            **options,
        )
        trainer = Recorder(
            policy,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list(texts),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    weights = {name: x.detach().numpy() for name, x in policy.state_dict().items()}
    return trainer.seen, weights


def main():
    texts = draw_texts()
    saved = {
        "words": json.dumps(WORDS),
        "texts": json.dumps(texts),
        "settings": json.dumps(SETTINGS),
        "cases": json.dumps(CASES),
        "unembedding_scale": np.float32(UNEMBEDDING_SCALE),
    }
    for name, options in TRL.items():
        seen, weights = train(texts, options)
        losses = [loss for _, loss in seen]
        print(name, losses)
        inputs, _ = seen[0]
        for key in ("input_ids", "attention_mask", "completion_mask"):
            saved[key] = inputs[key].numpy().astype(np.int32)
        saved[f"{name}/losses"] = np.array(losses, np.float32)
        saved |= {f"{name}/weights/{key}": x for key, x in weights.items()}
    np.savez_compressed(OUT, **saved)


if __name__ == "__main__":
    main()

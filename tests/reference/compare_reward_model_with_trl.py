"""Make tests/fixtures/reward_model_step.npz: optimizer steps of TRL's RewardTrainer.

Run in an environment with torch, transformers and trl 1.16 (the tests need none):

    python tests/reference/compare_reward_model_with_trl.py

From the checkpoint tests/fixtures/families/llama_score and texts of made-up words, TRL
encodes the pairs and takes Adam steps on all of them, in float32, for each case.

The file holds (B pairs, T tokens, S steps):
    words, texts          JSON: the vocabulary, and rows of prompt, chosen, rejected,
                          margin
    settings              JSON: keys are paths in configs/reward_model.py, for all cases
    cases                 JSON: a case's name -> settings of its own
    input_ids, attention_mask [2·B, T]   TRL's batch, chosen first
    margin [B]
    <case>/losses [S]     before each step
    <case>/grad_norms [S]
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
from trl import RewardConfig, RewardTrainer

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama_score"
OUT = FIXTURES / "reward_model_step.npz"
STEPS = {"plain": 1, "all": 2}
WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(93))]
LENGTHS = [(3, 5, 2), (1, 1, 4), (4, 3, 3), (2, 6, 1)]  # prompt, chosen, rejected
MARGINS = [0.5, 1.0, 0.0, 2.0]
SETTINGS = {
    "learning.soft_labels": False,
    "optimizer.name": "adam",
    "optimizer.lr": 1e-3,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}
CASES = {
    "plain": {
        "learning.margin": "",
        "learning.centering": 0.0,
        "optimizer.clip_norm": 0.0,
    },
    "all": {
        "learning.margin": "column",
        "learning.centering": 0.05,
        "optimizer.clip_norm": 1.0,
    },
}


class Recorder(RewardTrainer):
    """TRL's trainer, which keeps its batches and losses."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        loss_now = loss[0] if isinstance(loss, tuple) else loss
        self.seen = [*getattr(self, "seen", []), (inputs, loss_now.detach().item())]
        return loss


def make_tokenizer():
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.add_special_tokens(WORDS[:3])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def draw_texts():
    rng = np.random.default_rng(0)
    say = lambda n: " ".join(f"w{i}" for i in rng.integers(0, 93, n))
    return [
        {
            "prompt": say(p),
            "chosen": " " + say(c),
            "rejected": " " + say(r),
            "margin": margin,
        }
        for (p, c, r), margin in zip(LENGTHS, MARGINS)
    ]


def train(texts, case):
    """TRL's batch, its losses and gradient norms, and the weights after the last."""
    settings = SETTINGS | CASES[case]
    if not settings["learning.margin"]:
        texts = [{k: v for k, v in row.items() if k != "margin"} for row in texts]
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        SOURCE, dtype=torch.float32, attn_implementation="eager"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            folder,
            center_rewards_coefficient=settings["learning.centering"] or None,
            learning_rate=settings["optimizer.lr"],
            adam_beta1=settings["optimizer.b1"],
            adam_beta2=settings["optimizer.b2"],
            adam_epsilon=settings["optimizer.eps"],
            weight_decay=0.0,
            max_grad_norm=settings["optimizer.clip_norm"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            per_device_train_batch_size=len(texts),
            max_steps=STEPS[case],
            logging_steps=1,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
        )
        trainer = Recorder(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(texts),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    norms = [
        log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log
    ]
    weights = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    return trainer.seen, norms, weights


def main():
    texts = draw_texts()
    saved = {
        "words": json.dumps(WORDS),
        "texts": json.dumps(texts),
        "settings": json.dumps(SETTINGS),
        "cases": json.dumps(CASES),
    }
    for name in CASES:
        seen, norms, weights = train(texts, name)
        losses = [loss for _, loss in seen]
        print(name, losses, norms)
        inputs, _ = seen[0]
        for key in ("input_ids", "attention_mask"):
            saved[key] = inputs[key].numpy().astype(np.int32)
        if "margin" in inputs:  # of the same rows: TRL's order is that of its seed
            saved["margin"] = inputs["margin"].numpy()
        saved[f"{name}/losses"] = np.array(losses, np.float32)
        saved[f"{name}/grad_norms"] = np.array(norms, np.float32)
        saved |= {f"{name}/weights/{key}": x for key, x in weights.items()}
    np.savez_compressed(OUT, **saved)


if __name__ == "__main__":
    main()

"""Make tests/fixtures/sft_step.npz: optimizer steps of TRL's SFTTrainer.

Run in an environment with torch, transformers and trl 1.16 (the tests need none):

    python tests/reference/compare_sft_with_trl.py

From the checkpoint tests/fixtures/families/llama and prompts with responses of made-up
words, TRL encodes the rows and takes Adam steps on all of them, in float32, with the
loss on the responses alone.

The file holds (B rows, T tokens, S steps):
    words, texts          JSON: the vocabulary, and rows of prompt, completion
    settings              JSON: keys are paths in configs/sft.py
    input_ids, labels [B, T]   TRL's batch; a label of -100 is not learned
    losses [S]            before each step
    grad_norms [S]
    weights/*             after the last, under HF's names
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers as hf
from compare_reward_model_with_trl import WORDS, make_tokenizer
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama"
OUT = FIXTURES / "sft_step.npz"
STEPS = 2
LENGTHS = [(3, 5), (1, 1), (4, 3), (2, 6)]  # prompt, completion
SETTINGS = {
    "learning.loss": "nll",
    "learning.completion_only": True,
    "optimizer.name": "adam",
    "optimizer.lr": 1e-3,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
}


class Recorder(SFTTrainer):
    """TRL's trainer, which keeps its batches and losses."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        kept = {name: x.clone() for name, x in inputs.items()}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        loss_now = loss[0] if isinstance(loss, tuple) else loss
        self.seen = [*getattr(self, "seen", []), (kept, loss_now.detach().item())]
        return loss


def draw_texts():
    rng = np.random.default_rng(0)
    say = lambda n: " ".join(f"w{i}" for i in rng.integers(0, len(WORDS) - 3, n))
    return [{"prompt": say(p), "completion": " " + say(c)} for p, c in LENGTHS]


def main():
    texts = draw_texts()
    model = hf.AutoModelForCausalLM.from_pretrained(
        SOURCE, dtype=torch.float32, attn_implementation="eager"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            completion_only_loss=True,
            learning_rate=SETTINGS["optimizer.lr"],
            adam_beta1=SETTINGS["optimizer.b1"],
            adam_beta2=SETTINGS["optimizer.b2"],
            adam_epsilon=SETTINGS["optimizer.eps"],
            weight_decay=0.0,
            max_grad_norm=SETTINGS["optimizer.clip_norm"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            per_device_train_batch_size=len(texts),
            max_steps=STEPS,
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
    losses = [loss for _, loss in trainer.seen]
    print(losses, norms)
    inputs, _ = trainer.seen[0]
    weights = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    np.savez_compressed(
        OUT,
        words=json.dumps(WORDS),
        texts=json.dumps(texts),
        settings=json.dumps(SETTINGS),
        input_ids=inputs["input_ids"].numpy().astype(np.int32),
        labels=inputs["labels"].numpy().astype(np.int32),
        losses=np.array(losses, np.float32),
        grad_norms=np.array(norms, np.float32),
        **{f"weights/{name}": x for name, x in weights.items()},
    )


if __name__ == "__main__":
    main()

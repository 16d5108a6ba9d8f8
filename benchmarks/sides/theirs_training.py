"""The other side of the benchmark: the steps of TRL's trainers, and plain torch."""

import contextlib
import functools
import os
import pathlib
import tempfile
import threading
import traceback
from typing import Any

import torch
from cases import (
    GROUP,
    LONG_PROMPT,
    NEW,
    ROWS,
    SHORT_NEW,
    TRAIN_ROWS,
    TRAIN_TOKENS,
    as_text,
    even_share,
    pair_texts,
    prompt_texts,
    ragged_texts,
    tokens,
)
from datasets import Dataset
from theirs import compiled, load
from theirs_ppo import step_of_ppo
from transformers import AutoTokenizer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from worker import Case

# As fast as they can be on a CPU: no recomputation, no logs, one kernel for Adam.
PLAIN = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "optim": "adamw_torch_fused",
    "max_steps": 100_000,
    "logging_strategy": "no",
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
}


class Gate(TrainerCallback):
    """Lets a trainer in another thread take one step whenever it is told to."""

    def __init__(self):
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_begin(self, *_, **__):
        """Wait until a step is wanted."""
        self.go.acquire()

    def on_step_end(self, *_, **__):
        """Tell that the step is taken."""
        self.done.release()


def stepwise(trainer: Any) -> Any:
    """`step()`, which takes one optimizer step of `trainer.train()`."""
    gate = Gate()
    trainer.add_callback(gate)

    def train():
        try:
            trainer.train()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=train, daemon=True).start()

    def step():
        gate.go.release()
        gate.done.acquire()

    return step


def train(folder: str, *, bfloat16: bool = False) -> Case:
    """Steps of fused AdamW on full rows, in plain torch."""
    model = compiled(load(folder, "fixed").train())
    given = torch.from_numpy(tokens("train", TRAIN_ROWS, TRAIN_TOKENS))
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    matrices = [x for x in model.parameters() if x.ndim > 1]
    vectors = [x for x in model.parameters() if x.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-4,
        weight_decay=0.01,
        fused=True,
    )

    def run(number: int):
        cast = contextlib.nullcontext()
        if bfloat16:
            cast = torch.autocast("cpu", torch.bfloat16)
        with cast:
            loss = model(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.loss = float(loss.detach())

    def outputs():
        losses = [run.loss]
        for number in range(2):
            run(number)
            losses.append(run.loss)
        now = dict(model.named_parameters())
        names = {
            "moved query": "model.layers.0.self_attn.q_proj.weight",
            "moved down": "model.layers.0.mlp.down_proj.weight",
            "moved unembedding": "lm_head.weight",
        }
        moved = {k: (now[n] - start[n]).detach() for k, n in names.items()}
        return {"losses": losses, **moved}

    return Case(run, outputs)


def grpo_step(folder: str, *, name: str = "fixed", long: bool = False) -> Case:
    """Steps of GRPOTrainer: sampling, rewards, reference, one optimizer step."""
    prompts = prompt_texts(LONG_PROMPT) if long else prompt_texts()
    settings = GRPOConfig(
        tempfile.mkdtemp(),
        **PLAIN | {"learning_rate": 1e-9},
        per_device_train_batch_size=ROWS,
        num_generations=GROUP,
        max_completion_length=SHORT_NEW if long else NEW,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.04,
    )
    trainer = GRPOTrainer(
        load(folder, name),
        lambda completions, **_: [even_share(text) for text in completions],
        settings,
        train_dataset=Dataset.from_list([{"prompt": x} for x in prompts]),
        processing_class=AutoTokenizer.from_pretrained(pathlib.Path(folder) / name),
    )
    step = stepwise(trainer)

    def run(number: int):
        step()

    def outputs():
        step()
        return {"entropy": trainer._metrics["train"]["entropy"][-1]}

    return Case(run, outputs)


def dpo_step(folder: str, *, ragged: bool = False, before: bool = False) -> Case:
    """Steps of DPOTrainer on 8 pairs; the reference runs in each, or `before`."""
    names = ("prompt", "chosen", "rejected")
    texts = [dict(zip(names, x, strict=True)) for x in pair_texts(ragged=ragged)]
    settings = DPOConfig(
        tempfile.mkdtemp(),
        **PLAIN,
        per_device_train_batch_size=8,
        max_length=TRAIN_TOKENS,
        beta=0.1,
        precompute_ref_log_probs=before,
    )
    trainer = Recorder(
        load(folder, "fixed"),
        args=settings,
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(pathlib.Path(folder) / "fixed"),
    )
    step = stepwise(trainer)

    def run(number: int):
        step()

    def outputs():
        step()
        return {"loss": trainer.last_loss}

    return Case(run, outputs)


class Recorder(DPOTrainer):
    """DPOTrainer that remembers its last loss."""

    def compute_loss(self, *arguments, **options):
        """The loss of the batch."""
        found = super().compute_loss(*arguments, **options)
        loss = found[0] if isinstance(found, tuple) else found
        self.last_loss = float(loss.detach())
        return found


class Counter(SFTTrainer):
    """SFTTrainer that counts the tokens it learns from."""

    def compute_loss(self, model, inputs, *arguments, **options):
        """The loss of the batch."""
        self.learned = float((inputs["labels"][:, 1:] != -100).sum())
        return super().compute_loss(model, inputs, *arguments, **options)


def sft_step(folder: str, *, packing: bool = False) -> Case:
    """Steps of SFTTrainer on texts of all lengths: 16 texts, or 8 packed rows."""
    texts = [{"text": as_text(ids)} for ids in ragged_texts()]
    settings = SFTConfig(
        tempfile.mkdtemp(),
        **PLAIN,
        per_device_train_batch_size=TRAIN_ROWS if packing else ROWS,
        max_length=TRAIN_TOKENS,
        packing=packing,
    )
    trainer = Counter(
        load(folder, "fixed"),
        args=settings,
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(pathlib.Path(folder) / "fixed"),
    )
    step = stepwise(trainer)

    def run(number: int):
        step()
        return trainer.learned

    return Case(run, dict)


BUILDERS = {
    "train": train,
    "train_bf16": functools.partial(train, bfloat16=True),
    "grpo": grpo_step,
    "grpo_long": functools.partial(grpo_step, long=True),
    "grpo_lean": grpo_step,
    "grpo_ragged": functools.partial(grpo_step, name="ragged"),
    "dpo": dpo_step,
    "dpo_precomputed": functools.partial(dpo_step, before=True),
    "dpo_ragged": functools.partial(dpo_step, ragged=True),
    "sft": sft_step,
    "sft_packed": functools.partial(sft_step, packing=True),
    "ppo": step_of_ppo,
}

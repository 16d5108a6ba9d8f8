"""Supervised fine-tuning, offline: the first stage of alignment.

    python -m rlhf_jax.train --config=configs/sft.py

Fine-tunes the policy that ships with the package on the sentences of movie and product
reviews that people preferred to others with the same beginning, which is the prompt;
they are downloaded once. Several are packed into a row. Your own prompts and responses
are a flag away; chat messages are written by the tokenizer's template:

    --config.model=HuggingFaceTB/SmolLM2-135M --config.data.source=chats.jsonl
    --config.sequence_tokens=1024

Expect a held-out loss that goes from 4.97 to 4.95 nats a token of responses, for the
policy knows these sentences well, after some two minutes on two cores that have other
work too.

Completion-only loss is that of Ouyang et al. 2022, section 3.5,
https://arxiv.org/abs/2203.02155; NEFTune is of https://arxiv.org/abs/2310.05914, the
loss "dft" of https://arxiv.org/abs/2508.05629.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "algorithm": "sft",
            "workdir": "runs/sft",
            "seed": 0,
            "total_phases": 4,
            "model": "builtin",
            "tokenizer": "",
            "dropout": 0.1,
            "neftune_alpha": 0.0,  # 5 is common; 0: off
            "dtype": "float32",
            "export_dtype": "float32",
            "remat": True,
            "remat_keeps": "",  # "matmuls": more memory, on accelerators faster
            "unroll": 1,  # layers at a time: more is faster on CPUs, but compiles long
            # rank 0: off. Else all but the adapter is frozen, and is the reference.
            "lora": {
                "rank": 0,
                "alpha": 32.0,
                "dropout": 0.0,
                "targets": ("query", "key", "value", "out", "gate", "up", "down"),
                # A folder with an adapter, or a run's, to go on from; "": a fresh one.
                "start": "",
            },
            "freeze": (),  # patterns of weights' names, as "embed" or "layers/mlp"
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "data": {
                # or "builtin:reviews", a file, a hub's data set, "tfds:..."
                "source": "builtin:chosen",
                "domains": ("movie", "product"),
                "min_characters": 0,  # of a response
                "chat_template": "",  # a Jinja file; "": the tokenizer's own
                # Around prompts that are no chats, as "USER: {prompt} ASSISTANT:".
                "prompt_template": "",
            },
            "sequence_tokens": 64,
            "learning": {
                "batch": 16,  # rows
                "accumulation": 1,
                "steps_per_phase": 50,
                "loss": "nll",  # or "dft"
                "label_smoothing": 0.0,
                "completion_only": True,  # of texts without a prompt all is learned
                "packing": True,  # several texts a row
                "buckets": (),  # without packing: widths to cut batches to
            },
            "optimizer": {
                "name": "adam",
                "lr": 3e-4,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "lr_scales": (),  # (pattern of names, factor), the first that fits
                "clip_norm": 1.0,
                "schedule": "cosine",
                "warmup_steps": 20,
            },
            # What the sample texts of the log continue.
            "prompts": {
                "train": "builtin",
                "heldout": "builtin",
                "column": "",
                "extra_columns": (),
                "prompt_template": "",  # the same as of the data, if there is one
                "prefix_words": 0,
                "prefix_tokens": 0,
                "limit": 0,
                "heldout_limit": 8,
                "seed": 0,
            },
            "rollout": {
                "prompt_tokens": 12,
                "max_new_tokens": 32,
                "temperature": 0.7,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,  # 1: off
                "slots": 0,  # responses decoded together, refilled as they end; 0: all
                "cache_dtype": "",  # float32, bfloat16, int8; "": as dtype
            },
            "logprob_chunk": 0,
            "evaluate_every": 2,
            "samples_every": 3,
            "checkpoint": {"every": 3, "keep": 2, "keep_every": 0},
            # Alerts on a run gone wrong: off, warn, stop, or rollback, which ends the
            # training and exports the last good checkpoint. KL in nats, 0: no bound.
            "monitor": {"action": "warn", "kl": 20.0, "patience": 2},
            "nonfinite": "stop",  # or "skip" the step, or "rollback" and skip the phase
            "grace_s": 30.0,  # seconds from SIGTERM to the end of the process
            "logging": {"tensorboard": False, "wandb": "", "wandb_project": "rlhf_jax"},
        }
    )

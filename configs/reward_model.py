"""A reward model from what people think of sentences, on two cores in minutes.

    python -m rlhf_jax.train --config=configs/reward_model.py

Starts from the policy that ships with the package and learns to tell which of two
sentences that begin alike people rated higher, of movie and product reviews
(`rlhf_jax.data.preferences`). Held-out pairs share no sentence with the training ones.
It is a reward for the other algorithms:

    --config.rewards.human.source=runs/reward_model

In a config file {"source": "runs/reward_model", "normalize": True} brings its scores to
mean 0 and deviation 1, and several runs as the source are an ensemble
(`rlhf_jax.rewards`).

Your own model and pairs (the columns are listed in `rlhf_jax.data.formats`) are flags:

    --config.model=runs/sft --config.data.source=pairs.jsonl

Expect 0.834 of the 1,195 held-out pairs told right (95 % interval 0.812 to 0.854) and a
held-out loss of 0.42 nats, after some two minutes on two cores. A bag of words, fitted
in the same run on the same pairs, gets 0.841 (0.819 to 0.861), and "shorter wins"
0.502; the mean of three such models, as in `configs/pipeline.py`, gets 0.843.

`report/report.md` of the run shows what it gets wrong, and whether length or confidence
mislead it. The loss is that of Ouyang et al. 2022, equation 1,
https://arxiv.org/abs/2203.02155.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "algorithm": "reward_model",
            "workdir": "runs/reward_model",
            "seed": 0,
            "total_phases": 16,
            # The model to start from and its tokenizer: "builtin", a run's folder, a
            # directory, or a hub id.
            "model": "builtin",
            "tokenizer": "",
            "dropout": 0.2,
            "dtype": "float32",  # or "bfloat16": of the computation, not the masters
            "export_dtype": "float32",  # or "bfloat16": of the exported model
            "remat": True,  # recompute layers backwards: less memory, and faster on CPU
            "remat_keeps": "",  # "matmuls": more memory, on accelerators faster
            "unroll": 1,  # layers at a time: more is faster on CPUs, but compiles long
            # rank 0: off. Else all but the adapter and the head is frozen.
            "lora": {
                "rank": 0,
                "alpha": 32.0,
                "dropout": 0.0,
                "targets": ("query", "key", "value", "out", "gate", "up", "down"),
                # A folder with an adapter, or a run's, to go on from; "": a fresh one.
                "start": "",
            },
            "freeze": (),  # patterns of weights' names, as "embed" or "layers/mlp"
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: what is left
            "data": {
                "source": "builtin:reviews",
                "domains": ("movie", "product"),  # of the built-in sentences
                "rounds": 8,  # and random comparisons of each sentence, so many
                "train_split": "train",  # of a file, nine tenths of its prompts
                "heldout_split": "heldout",  # the others; a hub's test or validation
                "preference": "better",  # or "safer", of PKU-SafeRLHF
                "min_characters": 0,  # of each response
                # Around prompts that are no chats, as "USER: {prompt} ASSISTANT:".
                "prompt_template": "",
            },
            "sequence_tokens": 48,  # of prompt, response and EOS
            "learning": {
                "batch": 32,  # pairs
                "steps_per_phase": 48,
                "accumulation": 1,  # micro-batches of a batch
                # Pairs of like length share a batch, which is cut to one of these.
                "buckets": (16, 24, 32),
                "soft_labels": True,  # the raters' probabilities, not only the winner
                # By how much the chosen response should score higher: "" is 0, "column"
                # that of the data, "raters" the raters' gap.
                "margin": "",
                "centering": 0.01,  # pulls the mean score to zero
            },
            "optimizer": {
                "name": "adam",  # or "adam_tf", TensorFlow's place for eps
                "lr": 1e-3,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "lr_scales": (),  # (pattern of names, factor), the first that fits
                "clip_norm": 1.0,
                "schedule": "cosine",  # constant, linear, cosine
                "warmup_steps": 20,
            },
            "evaluate_every": 1,  # phases; 0: at the start and the end
            "samples_every": 0,
            "checkpoint": {"every": 4, "keep": 2, "keep_every": 0},  # keep 0: all
            # Alerts on a run gone wrong: off, warn, stop, or rollback, which ends the
            # training and exports the last good checkpoint. KL in nats, 0: no bound.
            "monitor": {"action": "warn", "kl": 20.0, "patience": 2},
            "nonfinite": "stop",  # or "skip" the step, or "rollback" and skip the phase
            "grace_s": 30.0,  # seconds from SIGTERM to the end of the process
            "logging": {"tensorboard": False, "wandb": "", "wandb_project": "rlhf_jax"},
        }
    )

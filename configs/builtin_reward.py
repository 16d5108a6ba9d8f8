"""The reward model that ships with the package, from what people think of sentences.

    python -m rlhf_jax.train --config=configs/builtin_reward.py

Starts from the policy of `configs/builtin_policy.py` and learns to tell which of two
sentences people rated higher, with the raters' probability as soft label. Held-out
pairs share their first words, and none of their sentences is in the training split.
Copy `export/` of the run to `rlhf_jax/builtin/reward` to ship it.

Expect 0.83 of the held-out pairs told right, and a held-out loss of 0.44 nats, after
about ten minutes on one core. The loss is that of Ouyang et al. 2022, equation 1,
https://arxiv.org/abs/2203.02155, with soft labels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "algorithm": "reward_model",
            "workdir": "runs/builtin_reward",
            "seed": 0,
            "total_phases": 16,
            "model": "builtin",
            "tokenizer": "",
            "dropout": 0.1,
            "dtype": "bfloat16",
            "export_dtype": "bfloat16",  # half the size, to ship
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
                "source": "builtin:reviews",
                "domains": ("movie", "product"),
                "rounds": 6,  # random comparisons of each sentence, besides the pairs
                "train_split": "train",
                "heldout_split": "validation",
                "preference": "better",
                "min_characters": 0,
            },
            "sequence_tokens": 48,
            "learning": {
                "batch": 32,
                "steps_per_phase": 50,
                "accumulation": 1,
                "buckets": (),  # widths that batches of like length are cut to
                "soft_labels": True,
                "margin": "",
                "centering": 0.01,
            },
            "optimizer": {
                "name": "adam",
                "lr": 5e-4,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "lr_scales": (),  # (pattern of names, factor), the first that fits
                "clip_norm": 1.0,
                "schedule": "cosine",
                "warmup_steps": 50,
            },
            "evaluate_every": 2,
            "samples_every": 0,
            "checkpoint": {"every": 8, "keep": 2, "keep_every": 0},
            # Alerts on a run gone wrong: off, warn, stop, or rollback, which ends the
            # training and exports the last good checkpoint. KL in nats, 0: no bound.
            "monitor": {"action": "warn", "kl": 20.0, "patience": 2},
            "nonfinite": "stop",  # or "skip" the step, or "rollback" and skip the phase
            "grace_s": 30.0,  # seconds from SIGTERM to the end of the process
            "logging": {"tensorboard": False, "wandb": "", "wandb_project": "rlhf_jax"},
        }
    )

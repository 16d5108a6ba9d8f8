"""A cost model: how harmful a response is, for training under a limit.

    python -m rlhf_jax.train --config=configs/cost_model.py \
        --config.data.source=PKU-Alignment/PKU-SafeRLHF --config.data.heldout_split=test

Learns from pairs which response is the safer one, and from labels which are safe: a
cost above zero is unsafe. The package has no such data; the source may also be a file
of the same columns, or, with --config.data.preference=better, one with chosen (the
safer one), rejected, chosen_safe and rejected_safe (`rlhf_jax.data.formats`).

Its prompts stand in words of safe-rlhf's. Where it gives costs, they have to be there
too: by the same `data.prompt_template` of PPO, or in the `text` of the reward,
"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}".

The loss is that of Safe RLHF, Dai et al. 2023, https://arxiv.org/abs/2310.12773. The
model it starts from is the small one that ships, which has read reviews alone: for
costs to rely on take a model that knows the subject, `--config.model=...`, with some
hundred times the pairs.

Expect little of a few pairs: from 212 of PKU-SafeRLHF it does not learn the order of
the 18 held out (0.50, 95 % interval 0.29 to 0.71; training 0.63), in about two minutes
on two cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "algorithm": "cost_model",
            "workdir": "runs/cost_model",
            "seed": 0,
            "total_phases": 4,
            # The model to start from and its tokenizer: "builtin", a run's folder, a
            # directory, or a hub id.
            "model": "builtin",
            "tokenizer": "",
            "dropout": 0.1,
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
                # Pairs that say which response is safer, and whether each is safe.
                "source": "",
                "domains": (),  # of built-in sentences, which have no costs
                "rounds": 0,
                "train_split": "train",  # of a file, nine tenths of its prompts
                "heldout_split": "validation",  # the others; of a hub often "test"
                "preference": "safer",  # of PKU-SafeRLHF; "better": the column chosen
                "min_characters": 0,  # of each response
                # Around prompts that are no chats, "" for nothing; this is safe-rlhf's.
                "prompt_template": (
                    "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"
                ),
            },
            "sequence_tokens": 256,  # of prompt, response and EOS
            "learning": {
                "batch": 16,  # pairs
                "steps_per_phase": 14,
                "accumulation": 1,  # micro-batches of a batch
                "buckets": (),  # widths that batches of like length are cut to
                "regularization": 0.001,  # pulls all costs to zero
            },
            "optimizer": {
                "name": "adam",  # or "adam_tf", TensorFlow's place for eps
                "lr": 3e-4,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "lr_scales": (),  # (pattern of names, factor), the first that fits
                "clip_norm": 1.0,
                "schedule": "cosine",  # constant, linear, cosine
                "warmup_steps": 10,
            },
            "evaluate_every": 1,  # phases; 0: at the start and the end
            "samples_every": 0,
            "checkpoint": {"every": 2, "keep": 2, "keep_every": 0},  # keep 0: all
            # Alerts on a run gone wrong: off, warn, stop, or rollback, which ends the
            # training and exports the last good checkpoint. KL in nats, 0: no bound.
            "monitor": {"action": "warn", "kl": 20.0, "patience": 2},
            "nonfinite": "stop",  # or "skip" the step, or "rollback" and skip the phase
            "grace_s": 30.0,  # seconds from SIGTERM to the end of the process
            "logging": {"tensorboard": False, "wandb": "", "wandb_project": "rlhf_jax"},
        }
    )

"""DPO on a small language model, offline: pairs in place of a reward model.

    python -m rlhf_jax.train --config=configs/dpo.py

The policy ships with the package. It learns from 6,000 pairs of sentences that begin
alike and that people rated differently (`rlhf_jax.data.preferences`), of movie and
product reviews; they are downloaded once. The algorithm is Rafailov et al. 2023,
https://arxiv.org/abs/2305.18290. Reward and judge are measured only, on the held-out
prompts of `configs/ppo.py`, so that the two compare.

Expect a held-out reward that goes from 0.18 to 1.29, VADER's judgement from 0.18 to
0.55, and a KL of 4.3 nats, after one epoch, which takes four minutes of CPU time. At a
learning rate of 3e-4 the reward is 1.59 for twice the KL, and the text suffers.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "algorithm": "dpo",
            "workdir": "runs/dpo",
            "seed": 0,
            "total_phases": 10,
            # The policy to start from, which is the reference too, and its tokenizer:
            # "builtin", a directory, or a hub id.
            "model": "builtin",
            "tokenizer": "",
            "dtype": "float32",  # or "bfloat16": of the computation, not the masters
            "export_dtype": "float32",  # or "bfloat16": of the exported model
            "remat": True,  # recompute layers backwards: less memory
            "remat_keeps": "",  # "matmuls": more memory, on accelerators faster
            "unroll": 1,  # layers at a time: more is faster on CPUs, but compiles long
            # rank 0: off. Else all but the adapter is frozen, and is the reference.
            "lora": {
                "rank": 0,
                "alpha": 32.0,
                "dropout": 0.0,
                "targets": ("query", "key", "value", "out", "gate", "up", "down"),
                # A folder with an adapter, or a run's, to go on from: it is in the
                # reference too. "": a fresh one.
                "start": "",
            },
            "freeze": (),  # patterns of weights' names, as "embed" or "layers/mlp"
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: what is left
            "data": {
                "source": "builtin:reviews",  # or a file, a hub's data set
                "domains": ("movie", "product"),  # of the built-in sentences
                "min_characters": 0,  # of a response
                # Around prompts that are no chats, as "USER: {prompt} ASSISTANT:".
                "prompt_template": "",
            },
            "sequence_tokens": 40,  # of prompt, response and EOS
            "learning": {
                "batch": 32,  # pairs
                "steps_per_phase": 19,
                "accumulation": 1,  # micro-batches of a batch
                # Several responses a row, and a pair's prompt once: faster where
                # lengths differ or prompts are long, once ten to twenty shapes are
                # compiled.
                "packing": False,
            },
            "dpo": {
                "beta": 0.1,
                # sigmoid, sigmoid_norm, hinge, ipo, ipo_sum, exo_pair, robust,
                # nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
                # discopop, sft
                "loss_type": "sigmoid",
                # In its place several with weights, as MPO has them:
                # {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
                "loss_types": {},
                "label_smoothing": 0.0,  # the probability that a label is wrong
                "divergence": "reverse_kl",  # forward_kl, js, alpha
                "alpha": 0.0,  # of the divergence "alpha", in (0, 1]
                "tau": 0.0,  # of discopop; 0.05 in its paper
                "ld_alpha": 1.0,  # weight of tokens past the shorter length; 1: off
                "wpo": False,  # weigh pairs by how likely the policy writes them
                "rpo_alpha": 0.0,  # weight of the SFT term on chosen responses
                "reference_free": False,  # every response as likely to the reference
            },
            "optimizer": {
                "name": "adam",  # or "adam_tf", TensorFlow's place for eps
                "lr": 2e-4,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "lr_scales": (),  # (pattern of names, factor), the first that fits
                "clip_norm": 1.0,
                "schedule": "linear",  # constant, linear, cosine
                "warmup_steps": 10,
            },
            # Held-out prompts, as of configs/ppo.py, and how they are answered.
            "prompts": {
                "train": "builtin",
                "heldout": "builtin",
                "column": "",
                "extra_columns": (),
                "prompt_template": "",  # the same as of the data, if there is one
                "prefix_words": 0,
                "prefix_tokens": 0,
                "limit": 0,
                "heldout_limit": 128,
                "seed": 0,
            },
            "rollout": {
                "prompts": 64,  # at a time
                "prompt_tokens": 12,
                "max_new_tokens": 32,
                "temperature": 0.7,
                "top_k": 0,  # 0: off
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,  # 1: off
                "slots": 0,  # responses decoded together, refilled as they end; 0: all
                "cache_dtype": "",  # float32, bfloat16, int8; "": as dtype
            },
            # Measured on those prompts, not trained on.
            "rewards": {"human": {"source": "builtin:reward", "weight": 1.0}},
            "judges": {"vader": {"source": "vader", "weight": 1.0}},
            "evaluate_kl": True,  # needs the reference's weights; False: no KL
            "logprob_chunk": 0,  # tokens of a row whose logits exist at a time; 0: all
            "evaluate_every": 5,  # phases; 0: at the start and the end
            "samples_every": 5,
            "checkpoint": {"every": 5, "keep": 0, "keep_every": 0},  # keep 0: all
            # Alerts on a run gone wrong: off, warn, stop, or rollback, which ends the
            # training and exports the last good checkpoint. KL in nats, 0: no bound.
            "monitor": {"action": "warn", "kl": 20.0, "patience": 2},
            "nonfinite": "stop",  # or "skip" the step, or "rollback" and skip the phase
            "grace_s": 30.0,  # seconds from SIGTERM to the end of the process
            "logging": {"tensorboard": False, "wandb": "", "wandb_project": "rlhf_jax"},
        }
    )

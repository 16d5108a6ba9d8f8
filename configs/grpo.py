"""GRPO on a small language model, offline: groups of responses in place of a critic.

    python -m rlhf_jax.train --config=configs/grpo.py

Models, prompts and reward are those of `configs/ppo.py`. The algorithm is Shao et al.
2024, https://arxiv.org/abs/2402.03300; its relatives are a few flags away:

    Dr. GRPO    --config.grpo.variant=dr_grpo
    DAPO        --config.grpo.variant=dapo --config.grpo.clip_high=0.28
                --config.grpo.kl_coef=0 --config.grpo.dynamic_sampling=3
    GSPO        --config.grpo.variant=gspo --config.grpo.clip_low=3e-4
                --config.grpo.clip_high=4e-4
    RLOO        --config.grpo.advantage=leave_one_out --config.grpo.kl_in=reward
                --config.grpo.aggregation=sequence_sum --config.grpo.kl_estimator=k1
    REINFORCE++ --config.grpo.advantage=reinforce_plus_plus --config.grpo.kl_in=reward
                --config.grpo.kl_estimator=k1 --config.rollout.group=1
                --config.rollout.prompts=64

Expect a held-out reward that goes from 0.18 to 1.46, VADER's judgement, which is not
trained on, from 0.18 to 0.67, and a KL of 5.2 nats, after some 70 seconds on two cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "algorithm": "grpo",
            "workdir": "runs/grpo",
            "seed": 0,
            "total_phases": 30,
            # The policy and its tokenizer: "builtin", a directory, or a hub id.
            "model": "builtin",
            "tokenizer": "",
            "dtype": "float32",  # or "bfloat16": of the computation, not the masters
            "export_dtype": "float32",  # or "bfloat16": of the exported model
            "remat": True,  # recompute layers backwards: less memory, and faster on CPU
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
                "train": "builtin",  # or a file, a hub's data set, "tfds:..."
                "heldout": "builtin",
                "column": "",  # "": "prompt", or else "text"
                "extra_columns": (),  # handed to the rewards by name
                "chat_template": "",  # a Jinja file; "": the tokenizer's own
                # Around prompts that are no chats, as "USER: {prompt} ASSISTANT:".
                "prompt_template": "",
                "prefix_words": 0,
                "prefix_tokens": 0,
                "limit": 0,
                "heldout_limit": 128,
                "seed": 0,
            },
            "rollout": {
                "prompts": 8,  # a phase
                "group": 8,  # responses to each
                "prompt_tokens": 12,
                "max_new_tokens": 32,
                "temperature": 0.7,
                "top_k": 0,  # 0: off; both make rollouts narrower than what learns
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,  # 1: off
                "slots": 0,  # responses decoded together, refilled as they end; 0: all
                "cache_dtype": "",  # float32, bfloat16, int8; "": as dtype
                "reuse_logprobs": False,  # the sampler's for the learner's: a pass less
            },
            # name -> source and weight; the reward is the weighted sum. A reward model
            # "on" tokens reads the policy's own, and the host is not waited for.
            "rewards": {
                "human": {"source": "builtin:reward", "weight": 1.0, "on": "text"}
            },
            # A cost, named as rewards are; a response above the limit pays the penalty.
            "safety": {"source": "", "limit": 0.0, "penalty": 1.0},
            # Measured on held-out prompts only, never trained on.
            "judges": {"vader": {"source": "vader", "weight": 1.0}},
            "grpo": {
                "variant": "grpo",  # dr_grpo, bnpo, dapo, gspo, cispo, sapo
                # "": the variant's; or group, batch, none, leave_one_out, opo,
                # reinforce_plus_plus, reinforce_plus_plus_baseline
                "advantage": "",
                "aggregation": "",  # "": the variant's; see losses.aggregation
                "epochs": 2,
                "minibatches": 2,
                "accumulation": 1,
                # Several responses a row, and their prompt once: faster where lengths
                # differ or prompts are long, once ten to twenty shapes are compiled.
                "packing": False,
                "clip_low": 0.2,
                "clip_high": 0.2,
                "dual_clip": 0.0,  # 0: off
                "ratio_min": 0.0,  # cispo
                "ratio_max": 5.0,
                "tau_pos": 1.0,  # sapo
                "tau_neg": 1.05,
                "std_eps": 1e-4,
                "entropy_coef": 0.0,
                "kl_in": "loss",  # or "reward"
                "kl_estimator": "k3",  # k1, k2, k3, abs
                "kl_coef": 0.1,
                "target_kl": 0.0,  # stop a phase's epochs beyond it; 0: off
                "score_clip": 0.0,  # 0: off
                "missing_eos_penalty": 0.0,
                "overlong": {
                    "buffer": 0,  # tokens before the limit in which the penalty grows
                    "factor": 1.0,
                    "filter": False,  # learn nothing from responses cut off
                },
                "dynamic_sampling": 0,  # draws at most, for groups that differ; 0: off
                # Sampler against learner; level token or sequence, "": off.
                "importance": {
                    "level": "",
                    "mode": "truncate",
                    "low": 0.0,
                    "high": 2.0,
                },
            },
            "optimizer": {
                "name": "adam",  # or "adam_tf", TensorFlow's place for eps
                "lr": 1.5e-4,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-5,
                "weight_decay": 0.0,
                "lr_scales": (),  # (pattern of names, factor), the first that fits
                "clip_norm": 1.0,
                "schedule": "linear",  # constant, linear, cosine
                "warmup_steps": 0,
            },
            "logprob_chunk": 0,  # tokens of a row whose logits exist at a time; 0: all
            "evaluate_every": 10,  # phases; 0: at the start and the end
            "samples_every": 10,
            "checkpoint": {"every": 10, "keep": 0, "keep_every": 0},  # keep 0: all
            # Alerts on a run gone wrong: off, warn, stop, or rollback, which ends the
            # training and exports the last good checkpoint. KL in nats, 0: no bound.
            "monitor": {"action": "warn", "kl": 20.0, "patience": 2},
            "nonfinite": "stop",  # or "skip" the step, or "rollback" and skip the phase
            "grace_s": 30.0,  # seconds from SIGTERM to the end of the process
            "logging": {"tensorboard": False, "wandb": "", "wandb_project": "rlhf_jax"},
        }
    )

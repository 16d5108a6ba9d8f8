"""The policy that ships with the package: a language model trained from nothing.

    python -m rlhf_jax.train --config=configs/builtin_policy.py

Trains a tokenizer and a small Llama on the human-rated sentences of
`rlhf_jax.data.reviews`, which are downloaded once. Copy `export/` of the run to
`rlhf_jax/builtin/policy` to ship it.

Expect a held-out loss of 5.23 nats a token, which is 1.26 nats a byte, after about nine
minutes on one core. A large vocabulary is worth its weight here: with 2,048 tokens in
place of 8,192 it is 1.28, and twice as many of the words it writes do not exist.

The shape is that of Touvron et al. 2023, https://arxiv.org/abs/2302.13971, but tiny.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "algorithm": "sft",
            "workdir": "runs/builtin_policy",
            "seed": 0,
            "total_phases": 24,
            # A dict in place of a name: a model to make, as transformers configures it.
            "model": {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 8192,
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "hidden_act": "silu",
                "tie_word_embeddings": True,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "bos_token_id": None,
            },
            "tokenizer": "train",  # on the training texts, with the model's vocabulary
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
            "neftune_alpha": 0.0,
            "data": {
                "source": "builtin:reviews",
                "domains": ("movie", "product", "news", "tweet"),
                "min_characters": 0,
            },
            "sequence_tokens": 40,
            "learning": {
                "batch": 32,
                "accumulation": 1,
                "steps_per_phase": 100,
                "loss": "nll",
                "label_smoothing": 0.0,
                "completion_only": False,
                "packing": False,
                "buckets": (),
            },
            "optimizer": {
                "name": "adam",
                "lr": 3e-3,
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.1,
                "lr_scales": (),  # (pattern of names, factor), the first that fits
                "clip_norm": 1.0,
                "schedule": "cosine",
                "warmup_steps": 200,
            },
            # What the sample texts of the log continue.
            "prompts": {
                "train": "builtin",
                "heldout": "builtin",
                "column": "",
                "extra_columns": (),
                "prefix_words": 0,
                "prefix_tokens": 0,
                "limit": 0,
                "heldout_limit": 8,
                "seed": 0,
            },
            "rollout": {
                "prompt_tokens": 12,
                "max_new_tokens": 32,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,  # 1: off
                "slots": 0,  # responses decoded together, refilled as they end; 0: all
                "cache_dtype": "",  # float32, bfloat16, int8; "": as dtype
            },
            "logprob_chunk": 0,
            "evaluate_every": 5,
            "samples_every": 10,
            "checkpoint": {"every": 10, "keep": 2, "keep_every": 0},
            # Alerts on a run gone wrong: off, warn, stop, or rollback, which ends the
            # training and exports the last good checkpoint. KL in nats, 0: no bound.
            "monitor": {"action": "warn", "kl": 20.0, "patience": 2},
            "nonfinite": "stop",  # or "skip" the step, or "rollback" and skip the phase
            "grace_s": 30.0,  # seconds from SIGTERM to the end of the process
            "logging": {"tensorboard": False, "wandb": "", "wandb_project": "rlhf_jax"},
        }
    )

"""PPO on GPT-2 with IMDb review openings and a sentiment reward.

    python -m rlhf_jax.train --config=configs/ppo_imdb.py

The classic first experiment: the model learns to go on from the first words of a movie
review in a positive way. Needs the network once, for GPT-2 and the reviews, and is
meant for an accelerator. Everything that is not set here is as in `configs/ppo.py`.
The reviews may also come from TFDS (`--config.data.train=tfds:imdb_reviews`), and the
model from any directory or hub id of the supported families.
"""

from ml_collections import ConfigDict

from configs import ppo


def get_config() -> ConfigDict:
    config = ppo.get_config()
    config.workdir = "runs/ppo_imdb"
    config.model = "gpt2"
    config.total_phases = 200
    config.dtype = "bfloat16"
    config.data.train = "stanfordnlp/imdb"
    config.data.heldout = "stanfordnlp/imdb"
    config.data.column = "text"
    config.data.prefix_tokens = 8
    config.data.limit = 20_000
    config.rollout.prompts = 128
    config.rollout.prompt_tokens = 10  # with room for the bos of some tokenizers
    config.rollout.max_new_tokens = 48
    config.rewards = ConfigDict({"sentiment": {"source": "vader", "weight": 1.0}})
    config.judges = ConfigDict(
        {
            "variety": {
                "source": "rlhf_jax.rewards.functions:distinct_words",
                "weight": 1.0,
            }
        }
    )
    config.ppo.kl_coef = 0.05
    config.ppo.minibatches = 4
    config.optimizer.lr = 1e-5
    config.optimizer.critic_lr = 1e-5
    config.optimizer.warmup_steps = 10
    config.logprob_chunk = 64
    config.checkpoint.every = 20
    return config

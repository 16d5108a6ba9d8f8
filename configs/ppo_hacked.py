"""A run that is made to go wrong, to see the monitor and the analysis at work.

    python -m rlhf_jax.train --config=configs/ppo_hacked.py
    python -m rlhf_jax.analyze --run=runs/ppo_hacked

It is `configs/ppo.py` without a bound to the reference, and with a reward that pays for
every word that the response has said before. VADER, an unseen judge, is the gold: it
goes with the reward at first, 0.18 to 0.42 in nine phases, and then falls to 0, while
the reward goes on to rise (Gao et al. 2023, https://arxiv.org/abs/2210.10760). The
monitor speaks from phase 4 on; the analysis says that it went wrong from phase 7 on.
With

    --config.monitor.action=rollback

the training ends at the first alert and exports the last good checkpoint.
"""

from ml_collections import ConfigDict

from configs import ppo


def get_config() -> ConfigDict:
    config = ppo.get_config()
    config.workdir = "runs/ppo_hacked"
    config.total_phases = 40
    config.ppo.kl_coef = 0.0
    source = "rlhf_jax.rewards.functions:repeats"
    config.rewards = ConfigDict({"repeats": {"source": source, "weight": 0.3}})
    config.evaluate_every = 1
    config.checkpoint.every = 1
    return config

"""A step of PPO in plain torch, for TRL 1.16 has no such trainer any more.

After Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO",
https://arxiv.org/abs/2403.17031: a critic of its own, KL-shaped rewards, GAE, whitened
advantages, both losses clipped. Dimension key: B rows, P prompt, N response tokens.
"""

import copy
import pathlib

import torch
from cases import NEW, PROMPT, ROWS, even_share, prompt_texts
from theirs import load, score
from transformers import AutoTokenizer
from worker import Case

GAMMA, LAM, KL_COEF, CLIP, VALUE_COEF = 1.0, 0.95, 0.2, 0.2, 0.1
EPOCHS, MINIBATCHES = 2, 2


def advantages_of(rewards: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Generalized advantage estimation of full responses, [B, N]."""
    found, running = [], torch.zeros(len(rewards))
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
    errors = rewards + GAMMA * following - values
    for t in reversed(range(rewards.shape[1])):
        running = errors[:, t] + GAMMA * LAM * running
        found.append(running)
    return torch.stack(found[::-1], 1)


def clipped(advantages: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """The clipped surrogate loss, a number."""
    bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.maximum(-advantages * ratio, -advantages * bounded).mean()


def clipped_value(values, old_values, returns) -> torch.Tensor:
    """The clipped loss of the critic, a number."""
    bounded = old_values + (values - old_values).clamp(-CLIP, CLIP)
    errors = torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    return 0.5 * errors.mean()


def step_of_ppo(folder: str) -> Case:
    """Sampling, rewards, assessment, two epochs of two minibatches."""
    policy = load(folder, "fixed").train()
    reference = load(folder, "fixed").eval()
    trunk, head = (
        copy.deepcopy(policy.model),
        torch.nn.Linear(policy.config.hidden_size, 1),
    )
    torch.nn.init.zeros_(head.weight)
    options = {"betas": (0.9, 0.999), "fused": True}
    groups = [
        {"params": policy.parameters(), "lr": 1e-4},
        {"params": [*trunk.parameters(), *head.parameters()], "lr": 1e-3},
    ]
    optimizer = torch.optim.Adam(groups, **options)
    tokenizer = AutoTokenizer.from_pretrained(pathlib.Path(folder) / "fixed")
    tokenizer.padding_side = "left"
    prompts = tokenizer(prompt_texts()[:ROWS], return_tensors="pt")

    def values_of(ids: torch.Tensor) -> torch.Tensor:
        hidden = trunk(ids, use_cache=False).last_hidden_state
        return head(hidden[:, PROMPT - 1 : -1])[..., 0]

    @torch.no_grad()
    def experience() -> tuple[torch.Tensor, ...]:
        drawn = policy.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=NEW)
        texts = tokenizer.batch_decode(drawn[:, PROMPT:], skip_special_tokens=True)
        scores = torch.tensor([even_share(text) for text in texts])
        old = score(policy, drawn, PROMPT)
        rewards = -KL_COEF * (old - score(reference, drawn, PROMPT))
        rewards[:, -1] += scores
        values = values_of(drawn)
        advantages = advantages_of(rewards, values)
        returns = advantages + values
        whitened = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return drawn, old, values, whitened, returns

    def run(number: int):
        rows = experience()
        for _ in range(EPOCHS):
            for index in torch.randperm(ROWS).chunk(MINIBATCHES):
                drawn, old, values, advantages, returns = (x[index] for x in rows)
                ratio = (score(policy, drawn, PROMPT) - old).exp()
                value_loss = clipped_value(values_of(drawn), values, returns)
                loss = clipped(advantages, ratio) + VALUE_COEF * value_loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    return Case(run, dict)

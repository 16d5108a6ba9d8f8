"""Make tests/fixtures/ppo_update.npz: one PPO phase by an independent implementation.

Run in an environment with torch and transformers (neither is needed by the tests):

    python tests/reference/make_ppo_update_fixture.py

From the checkpoint tests/fixtures/families/llama and fixed random tokens it computes
the experience (KL-shaped rewards, GAE, whitening) and four optimizer steps, two epochs
of two minibatches, in double precision, a response at a time and token by token.

The file holds (B rows, P prompt tokens, N response tokens, S steps):
    settings                        JSON, keys are paths in configs/ppo.py
    prompts, prompt_mask [B, P]     left-padded
    responses, mask [B, N]          right-padded, EOS inside the mask
    finished [B]   scores [B]   order [2, 2, B/2]
    unembedding_scale               the reference is the policy with this factor on it
    score_kernel [D, 1]             the critic is the same trunk with this head
    old_logprobs, values, advantages, returns [B, N]
    steps/*  [S]                    losses before each step
    policy/*, critic/*              the weights after the last, under HF's names
"""

import json
import math
import pathlib

import numpy as np
import torch
import transformers as hf

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama"
OUT = FIXTURES / "ppo_update.npz"
B, P, N, PAD, EOS = 8, 6, 5, 0, 2
UNEMBEDDING_SCALE = 0.8
SETTINGS = {
    "rollout.temperature": 0.7,
    "ppo.epochs": 2,
    "ppo.minibatches": 2,
    "ppo.clip_low": 0.2,
    "ppo.clip_high": 0.3,
    "ppo.value_clip": 0.05,
    "ppo.value_coef": 0.5,
    "ppo.entropy_coef": 0.02,
    "ppo.gamma": 0.97,
    "ppo.lam": 0.9,
    "ppo.kl_estimator": "k1",
    "ppo.kl_coef": 0.1,
    "ppo.missing_eos_penalty": 0.5,
    "ppo.whiten_advantages": True,
    "ppo.whiten_rewards": False,
    "optimizer.lr": 5e-4,
    "optimizer.critic_lr": 2e-3,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-5,
    "optimizer.clip_norm": 1.0,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 0,
    "total_phases": 2,
}


def draw_inputs():
    """Random prompts of 1 to P tokens and responses of 1 to N, six of them ended."""
    rng = np.random.default_rng(0)
    prompt_lengths = np.array([6, 3, 1, 5, 4, 6, 2, 3])
    lengths = np.array([5, 3, 1, 5, 4, 2, 5, 3])
    finished = np.array([False, True, True, True, True, True, False, True])
    prompts = np.full((B, P), PAD)
    responses = np.full((B, N), PAD)
    for row in range(B):
        n, m = prompt_lengths[row], lengths[row]
        prompts[row, P - n :] = rng.integers(3, 96, n)
        responses[row, :m] = rng.integers(3, 96, m)
        if finished[row]:
            responses[row, m - 1] = EOS
    width = hf.AutoConfig.from_pretrained(SOURCE).hidden_size
    order = np.stack([rng.permutation(B).reshape(2, B // 2) for _ in range(2)])
    return {
        "prompts": prompts.astype(np.int32),
        "prompt_mask": np.arange(P) >= P - prompt_lengths[:, None],
        "responses": responses.astype(np.int32),
        "mask": np.arange(N) < lengths[:, None],
        "finished": finished,
        "scores": rng.normal(0.3, 1.0, B).astype(np.float32),
        "order": order.astype(np.int32),
        "unembedding_scale": np.float32(UNEMBEDDING_SCALE),
        "score_kernel": rng.normal(0, 0.3, (width, 1)).astype(np.float32),
    }


def load_networks(score_kernel):
    """Policy, reference and critic in double precision."""
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    load = lambda: hf.AutoModelForCausalLM.from_pretrained(SOURCE, **options)
    policy, reference, critic = load(), load(), load()
    with torch.no_grad():
        reference.lm_head.weight.mul_(UNEMBEDDING_SCALE)
    critic.lm_head = torch.nn.Linear(len(score_kernel), 1, bias=False)
    critic.lm_head.weight = torch.nn.Parameter(torch.tensor(score_kernel.T).double())
    return policy, reference, critic


def read(network, inputs, row):
    """What the network says where each real response token is predicted: [n, V or 1].

    The padding is cut off, so that no mask and no position is taken on trust.
    """
    prompt = inputs["prompts"][row][inputs["prompt_mask"][row]]
    response = inputs["responses"][row][inputs["mask"][row]]
    tokens = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)
    return network(tokens[None]).logits[0, len(prompt) - 1 : -1], response


def speak(policy, inputs, row):
    """Log-probabilities of the real response tokens, and entropies, both [n]."""
    logits, response = read(policy, inputs, row)
    logp = torch.log_softmax(logits / SETTINGS["rollout.temperature"], dim=-1)
    chosen = logp[torch.arange(len(response)), torch.tensor(response).long()]
    return chosen, -(logp.exp() * logp).sum(-1)


def value(critic, inputs, row):
    return read(critic, inputs, row)[0][:, 0]


@torch.no_grad()
def assess(policy, reference, critic, inputs):
    """The experience: a list over rows of dicts of [n] tensors."""
    rows = []
    for row in range(B):
        logprobs, _ = speak(policy, inputs, row)
        ref_logprobs, _ = speak(reference, inputs, row)
        values = value(critic, inputs, row)
        n = len(values)
        rewards = [-SETTINGS["ppo.kl_coef"] * x for x in logprobs - ref_logprobs]
        rewards[-1] = rewards[-1] + float(inputs["scores"][row])
        if not inputs["finished"][row]:
            rewards[-1] = rewards[-1] - SETTINGS["ppo.missing_eos_penalty"]
        gamma, lam = SETTINGS["ppo.gamma"], SETTINGS["ppo.lam"]
        following = [*values[1:], 0.0]
        deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
        # Equation 16 of the GAE paper as it stands: a discounted sum of all errors.
        advantages = torch.stack(
            [
                sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n))
                for t in range(n)
            ]
        )
        found = {
            "old_logprobs": logprobs,
            "values": values,
            "advantages": advantages,
            "returns": advantages + values,
        }
        rows.append(found)
    every = torch.cat([row["advantages"] for row in rows])
    scale = torch.sqrt(every.var(unbiased=False) + 1e-8)
    for row in rows:
        row["advantages"] = (row["advantages"] - every.mean()) / scale
    return rows


def losses(policy, critic, inputs, experience, rows):
    """The losses of one minibatch: means over its real tokens."""
    sums = dict.fromkeys(
        ("policy", "value", "entropy", "clipped", "value_clipped", "approx_kl"), 0.0
    )
    count = 0
    low, high = 1 - SETTINGS["ppo.clip_low"], 1 + SETTINGS["ppo.clip_high"]
    reach = SETTINGS["ppo.value_clip"]
    for row in rows:
        logprobs, entropy = speak(policy, inputs, row)
        values = value(critic, inputs, row)
        old = experience[row]
        for t in range(len(values)):
            log_ratio = logprobs[t] - old["old_logprobs"][t]
            ratio = torch.exp(log_ratio)
            free = -old["advantages"][t] * ratio
            held = -old["advantages"][t] * ratio.clamp(low, high)
            change = (values[t] - old["values"][t]).clamp(-reach, reach)
            error = (values[t] - old["returns"][t]) ** 2
            held_error = (old["values"][t] + change - old["returns"][t]) ** 2
            sums["policy"] += torch.maximum(free, held)
            sums["value"] += 0.5 * torch.maximum(error, held_error)
            sums["entropy"] += entropy[t]
            sums["clipped"] += float(held > free)
            sums["value_clipped"] += float(held_error > error)
            sums["approx_kl"] += 0.5 * float(log_ratio.detach()) ** 2
            count += 1
    found = {name: total / count for name, total in sums.items()}
    found["loss"] = (
        found["policy"]
        + SETTINGS["ppo.value_coef"] * found["value"]
        - SETTINGS["ppo.entropy_coef"] * found["entropy"]
    )
    return found


def clip_gradients(network):
    """Scales the gradients to the allowed norm; returns the norm before."""
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    if norm > SETTINGS["optimizer.clip_norm"]:
        for grad in grads:
            grad.mul_(SETTINGS["optimizer.clip_norm"] / norm)
    return norm


def learn(policy, critic, inputs, experience):
    """Four steps; what was measured before each."""
    lrs = {policy: SETTINGS["optimizer.lr"], critic: SETTINGS["optimizer.critic_lr"]}
    betas = SETTINGS["optimizer.b1"], SETTINGS["optimizer.b2"]
    optimizers = {
        network: torch.optim.Adam(
            network.parameters(), lr=lr, betas=betas, eps=SETTINGS["optimizer.eps"]
        )
        for network, lr in lrs.items()
    }
    minibatches = inputs["order"].reshape(-1, inputs["order"].shape[-1])
    total_steps = SETTINGS["total_phases"] * len(minibatches)
    history = []
    for step, rows in enumerate(minibatches):
        found = losses(policy, critic, inputs, experience, rows)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        found["loss"].backward()
        found |= {"lr": SETTINGS["optimizer.lr"] * (1 - step / total_steps)}
        found["policy_grad_norm"] = clip_gradients(policy)
        found["value_grad_norm"] = clip_gradients(critic)
        for network, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = lrs[network] * (1 - step / total_steps)
            optimizer.step()
        history.append({name: float(x) for name, x in found.items()})
    return history


def main():
    torch.use_deterministic_algorithms(True)
    inputs = draw_inputs()
    policy, reference, critic = load_networks(inputs["score_kernel"])
    experience = assess(policy, reference, critic, inputs)
    saved = dict(inputs)
    for name in experience[0]:
        saved[name] = np.zeros((B, N), np.float32)
        for row in range(B):
            saved[name][row, inputs["mask"][row]] = experience[row][name].numpy()
    history = learn(policy, critic, inputs, experience)
    for step in history:
        print({name: round(x, 5) for name, x in step.items()})
    for name in history[0]:
        saved[f"steps/{name}"] = np.array([step[name] for step in history], np.float32)
    for part, network in {"policy": policy, "critic": critic}.items():
        for name, weight in network.state_dict().items():
            name = (
                "score.weight" if (part, name) == ("critic", "lm_head.weight") else name
            )
            saved[f"{part}/{name}"] = weight.numpy().astype(np.float32)
    np.savez_compressed(OUT, settings=json.dumps(SETTINGS), **saved)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

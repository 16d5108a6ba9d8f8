"""GRPO in plain JAX: all that it takes from this library are its loss functions.

The policy, an embedding and an output matrix, learns to count upward: the reward is the
share of neighbours in which the second number is the larger one, and 0 ends a response.

    python examples/grpo.py          # the mean reward goes from 0.3 to 0.9
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax import losses

PROMPTS, GROUP, T, V, D = 8, 16, 8, 12, 32  # T tokens of V kinds, D wide
END = 0


def hidden_states(params, tokens):
    """What predicts the token after each one: [B, T] -> [B, T, D]."""
    return jnp.tanh(params["embedding"][tokens])


def sample(params, key, prompts):
    """Responses [B, T] that follow the prompts' tokens [B]."""

    def step(token, key):
        logits = hidden_states(params, token) @ params["unembedding"].T
        token = jax.random.categorical(key, logits)
        return token, token

    _, responses = jax.lax.scan(step, prompts, jax.random.split(key, T))
    return responses.T


def reward(responses, mask):
    """The share of the T - 1 pairs of neighbours that are real and in order."""
    ascending = (responses[:, 1:] > responses[:, :-1]) & mask[:, 1:]
    return ascending.mean(1)


def logprobs_of(params, inputs, responses, mask):
    """Log π of each response token and the entropy, both [B, T]."""
    hidden = hidden_states(params, inputs)
    return losses.token_logprobs(
        hidden, params["unembedding"], responses, mask, temperature=1.0, chunk_size=4
    )


@functools.partial(jax.jit, donate_argnums=0)
def train_step(params, ref_params, key):
    """One phase: a group of responses to each prompt, then two gradient steps."""
    prompt_key, sample_key = jax.random.split(key)
    prompts = jax.random.randint(prompt_key, (PROMPTS,), 1, V).repeat(GROUP)
    responses = sample(params, sample_key, prompts)
    inputs = jnp.concatenate([prompts[:, None], responses[:, :-1]], axis=1)
    ended = jnp.cumsum(responses == END, axis=1) - (responses == END)
    mask = ended == 0  # the end token itself is real
    rewards = reward(responses, mask)

    advantages = losses.group_relative(rewards, group_size=GROUP, scale="group")
    advantages = losses.over_tokens(advantages, mask)
    old_logprobs, _ = logprobs_of(params, inputs, responses, mask)
    ref_logprobs, _ = logprobs_of(ref_params, inputs, responses, mask)

    def loss(params):
        logprobs, _ = logprobs_of(params, inputs, responses, mask)
        policy_loss, _ = losses.clipped_surrogate(
            logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.28
        )
        kl = losses.kl.k3(logprobs, ref_logprobs, mask)
        total, count = losses.aggregation.token_mean(policy_loss + 0.01 * kl, mask)
        return total / count

    for _ in range(2):
        gradient = jax.grad(loss)(params)
        params = jax.tree.map(lambda p, g: p - 2.0 * g, params, gradient)
    return params, rewards.mean()


def main(steps=200):
    """Train and print; returns the mean reward of each step."""
    keys = jax.random.split(jax.random.key(0), steps + 2)
    params = {
        "embedding": jax.random.normal(keys[0], (V, D)),
        "unembedding": 0.1 * jax.random.normal(keys[1], (V, D)),
    }
    ref_params = jax.tree.map(jnp.copy, params)
    rewards = []
    for step, key in enumerate(keys[2:]):
        params, mean = train_step(params, ref_params, key)
        rewards.append(float(mean))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  reward {rewards[-1]:.2f}")
    return rewards


if __name__ == "__main__":
    main()

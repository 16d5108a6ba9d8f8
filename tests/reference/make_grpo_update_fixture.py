"""Make tests/fixtures/grpo_update.npz: one step of GRPO and its variants by TRL.

Run in an environment with torch, transformers and trl 1.16 (none is needed by the
tests):

    python tests/reference/make_grpo_update_fixture.py

From the checkpoint tests/fixtures/families/llama and fixed random tokens, two groups of
four, it computes log-probabilities and advantages a response at a time, the loss by
TRL's own `GRPOTrainer._compute_loss`, and one Adam step by torch, in double precision.
The old log-probabilities are not those of the policy, so that ratios clip.

The file holds (B rows, P prompt tokens, N response tokens):
    settings                        JSON, keys are paths in configs/grpo.py
    cases                           JSON, name -> more of them
    prompts, prompt_mask [B, P]     left-padded, the same in a group
    responses, mask [B, N]          right-padded, EOS inside the mask
    finished [B]   scores [B]   order [1, 1, B]
    unembedding_scale               the reference is the policy with this factor on it
    logprobs, ref_logprobs, old_logprobs [B, N]
    advantages/<scale> [B, N]       after the penalty of what was cut off
    <case>/loss, grad_norm, and where TRL measures it clip_fraction
    <case>/change/*                 float16, new weights less old, under HF's names
"""

import json

import numpy as np
import torch
from make_policy_fixtures import trl_compute, trl_trainer
from make_ppo_update_fixture import (
    FIXTURES,
    SOURCE,
    B,
    N,
    clip_gradients,
    draw_inputs,
    load_networks,
    speak,
)
from make_ppo_update_fixture import SETTINGS as PPO
from safetensors.numpy import load_file

OUT = FIXTURES / "grpo_update.npz"
GROUP = 4
SETTINGS = {
    "rollout.prompts": B // GROUP,
    "rollout.group": GROUP,
    "rollout.max_new_tokens": 7,  # more than any response has
    "rollout.temperature": PPO["rollout.temperature"],
    "grpo.epochs": 1,
    "grpo.minibatches": 1,
    "grpo.kl_in": "loss",
    "grpo.kl_estimator": "k3",
    "grpo.kl_coef": 0.1,
    "grpo.std_eps": 1e-4,
    "grpo.missing_eos_penalty": 0.5,
    "optimizer.name": "adam",
    "optimizer.lr": 1e-3,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-2,  # large: the step is to tell the size of the gradient
    "optimizer.clip_norm": PPO["optimizer.clip_norm"],
    "optimizer.schedule": "constant",
}
CASES = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.3},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.25},
    # TRL's bonus is a mean over tokens, which is the variant's own mean here alone.
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "entropy_coef": 0.02},
    "gspo": {"clip_low": 0.04, "clip_high": 0.05},
    "bnpo": {"clip_low": 0.2, "clip_high": 0.2, "accumulation": 2},
    "cispo": {"ratio_max": 1.2},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.3},
}
WITH_WEIGHTS = ("grpo", "dr_grpo", "dapo", "gspo")


def draw_groups():
    """The inputs of the PPO fixture, with one prompt to each group."""
    inputs = draw_inputs()
    first = np.arange(B) // GROUP * GROUP
    for name in ("prompts", "prompt_mask"):
        inputs[name] = inputs[name][first]
    inputs.pop("score_kernel")
    return inputs | {"order": inputs["order"][:1].reshape(1, 1, B)}


def pad(rows):
    """[B, N] of the rows' [n]."""
    return torch.stack([torch.nn.functional.pad(x, (0, N - len(x))) for x in rows])


def speak_all(policy, inputs):
    """Log-probabilities and entropies [B, N]."""
    said = [speak(policy, inputs, row) for row in range(B)]
    return tuple(pad(rows) for rows in zip(*said))


def advantages_of(inputs, scale):
    """[B], a group at a time."""
    penalty = SETTINGS["grpo.missing_eos_penalty"] * ~inputs["finished"]
    scores = torch.tensor(inputs["scores"]).double() - torch.tensor(penalty)
    found = []
    for group in scores.split(GROUP):
        better = group - group.mean()
        if scale == "group":
            better = better / (group.std() + SETTINGS["grpo.std_eps"])
        found.append(better)
    return torch.cat(found)


def scale_of(name):
    return "none" if name == "dr_grpo" else "group"


def loss_of(name, trainer, said, inputs, experience, accumulation):
    """TRL's loss of all rows, in as many micro-batches as it is given."""
    mask = torch.tensor(inputs["mask"])
    total = 0.0
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.args.steps_per_generation = accumulation
    for rows in inputs["order"].reshape(accumulation, -1):
        total = total + trl_compute(
            trainer,
            *(x[rows] for x in said),
            mask[rows],
            advantages=experience[f"advantages/{scale_of(name)}"][rows],
            old_per_token_logps=experience["old_logprobs"][rows],
            ref_per_token_logps=experience["ref_logprobs"][rows],
            num_items_in_batch=mask.sum(),
        )
    return total


def learn(name, inputs, experience):
    """One step: what was measured before it, and how the weights changed."""
    settings = CASES[name]
    policy, *_ = load_networks(np.zeros((32, 1)))
    trainer = trl_trainer(
        name,
        settings,
        max_length=SETTINGS["rollout.max_new_tokens"],
        beta=SETTINGS["grpo.kl_coef"],
        _entropy_bonus_enabled="entropy_coef" in settings,
        use_adaptive_entropy=False,
        entropy_coef=settings.get("entropy_coef"),
    )
    accumulation = settings.get("accumulation", 1)
    said = speak_all(policy, inputs)
    loss = loss_of(name, trainer, said, inputs, experience, accumulation)
    loss.backward()
    found = {"loss": loss.item(), "grad_norm": clip_gradients(policy)}
    measured = trainer._metrics["train"]
    if name in ("grpo", "dapo", "bnpo"):
        # Of each micro-batch by its tokens; with a dual clip TRL counts otherwise.
        counts = [
            inputs["mask"][r].sum() for r in inputs["order"].reshape(accumulation, -1)
        ]
        clipped = np.array(measured["clip_ratio/region_mean"])
        found["clip_fraction"] = (clipped * counts).sum() / sum(counts)
    torch.optim.Adam(
        policy.parameters(),
        lr=SETTINGS["optimizer.lr"],
        betas=(SETTINGS["optimizer.b1"], SETTINGS["optimizer.b2"]),
        eps=SETTINGS["optimizer.eps"],
    ).step()
    print(name, {key: round(x, 5) for key, x in found.items()})
    if name in WITH_WEIGHTS:
        before = load_file(SOURCE / "model.safetensors")
        for key, weight in policy.state_dict().items():
            change = weight.numpy() - before[key].astype(np.float64)
            found[f"change/{key}"] = change.astype(np.float16)
    return found


def main():
    torch.use_deterministic_algorithms(True)
    inputs = draw_groups()
    policy, reference, _ = load_networks(np.zeros((32, 1)))
    with torch.no_grad():
        logprobs, _ = speak_all(policy, inputs)
        ref_logprobs, _ = speak_all(reference, inputs)
    rng = np.random.default_rng(1)
    drift = rng.normal(0, 0.05, (B, 1)) + rng.normal(0, 0.25, (B, N))
    experience = {
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        # What the file holds, exactly: a ratio on the edge of the clip may not move.
        "old_logprobs": (logprobs + torch.tensor(drift)).float().double()
        * torch.tensor(inputs["mask"]),
        **{f"advantages/{s}": advantages_of(inputs, s) for s in ("group", "none")},
    }
    saved = {name: x.numpy().astype(np.float32) for name, x in experience.items()}
    for name in CASES:
        found = learn(name, inputs, experience)
        saved |= {f"{name}/{key}": np.asarray(x) for key, x in found.items()}
    cases = {
        name: {f"grpo.{key}": x for key, x in settings.items()} | {"grpo.variant": name}
        for name, settings in CASES.items()
    }
    np.savez_compressed(
        OUT, settings=json.dumps(SETTINGS), cases=json.dumps(cases), **inputs, **saved
    )
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

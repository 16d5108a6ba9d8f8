"""Make tests/fixtures/losses/advantages.npz: what TRL, verl and OpenRLHF compute.

Run in an environment with torch, transformers, datasets and trl, on two checkouts:

    python tests/reference/make_advantage_fixtures.py VERL OPENRLHF

Their own code is called. TRL's trainers run one generation step of a tiny random model
whose reward function reads a column. verl and OpenRLHF are imported without their
`__init__` files and with empty modules in place of ray, deepspeed and the like;
`torch.no_grad` is lifted, so that the gradient can be taken.

The file holds (B rows in groups of GROUP, T tokens):
    rewards, scored, lengths, greedy_rewards [B]   token_rewards, values [B, T]
    mask, gappy [B, T]     right-padded; the same with holes
    cotangent [B, T]       gradients are of the sum of cotangent times mask times result
    trl/*                  [B], from rewards and scored; unscored rewards are None
    verl/*, openrlhf/*     [B, T]; over tokens outside the mask they are no oracle
    verl/*/gradient        [B, T] by token_rewards, [B] by rewards
    */overlong             [B], from lengths
"""

import contextlib
import importlib
import pathlib
import sys
import tempfile
import types
from unittest import mock

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.rewards import get_soft_overlong_punishment

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "advantages.npz"
B, T, GROUP, GAMMA, LAM = 16, 7, 4, 0.9, 0.8
MAX_LENGTH, BUFFER, FACTOR = 100, 40, 0.5


def draw_inputs():
    rng = np.random.default_rng(0)
    rewards = rng.normal(0.5, 1.0, B).astype(np.float32)
    rewards[4:8] = 0.5  # a group of equal rewards
    scored = np.ones(B, bool)
    scored[[1, 9, 10, 11]] = False  # leaves three of four, then one
    tokens = rng.integers(1, T + 1, B)
    tokens[:2] = 1, T
    mask = np.arange(T) < tokens[:, None]
    gappy = mask & (rng.random((B, T)) < 0.7)
    gappy[:, 0] = True
    drawn = rng.normal(size=(3, B, T)).astype(np.float32)
    return {
        "rewards": rewards,
        "scored": scored,
        "lengths": np.array([0, 1, 59, *range(60, 104, 4), 140, 1000]),
        "greedy_rewards": rng.normal(size=B).astype(np.float32),
        "token_rewards": drawn[0],
        "values": drawn[1],
        "cotangent": drawn[2],
        "mask": mask,
        "gappy": gappy,
    }


def tiny_tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def run_trl(inputs, trainer_class, config_class, **settings):
    """The advantages of one generation step, [B]."""

    def score(completions, reward, **columns):
        return [None if np.isnan(x) else float(x) for x in reward]

    rewards = np.where(inputs["scored"], inputs["rewards"], np.nan)
    rows = [
        {"prompt": "abcdefgh"[i // GROUP], "reward": float(x)}
        for i, x in enumerate(rewards)
    ]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=transformers.LlamaForCausalLM(config),
            processing_class=tiny_tokenizer(),
            reward_funcs=score,
            train_dataset=datasets.Dataset.from_list(rows),
            args=config_class(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                report_to=[],
                beta=0.0,
                max_completion_length=3,
                per_device_train_batch_size=B,
                num_generations=GROUP,
                **settings,
            ),
        )
        trainer.model.train()
        result = trainer._generate_and_score_completions(rows)
    return result["advantages"].numpy()


@contextlib.contextmanager
def bare_packages(root, packages, empty, **attributes):
    """Import from a checkout: packages without their `__init__`, empty ones faked."""
    fakes = {name: mock.MagicMock(name=name) for name in empty}
    for name in packages:
        fakes[name] = types.ModuleType(name)
        fakes[name].__path__ = [str(root / name.replace(".", "/"))]
    with (
        mock.patch.dict(sys.modules, fakes),
        mock.patch.object(torch, "no_grad", torch.enable_grad),
    ):
        for name, value in attributes.items():
            setattr(fakes[packages[0] + ".utils"], name, value)
        yield


def value_and_gradient(inputs, name, function, x, mask):
    """What `function` makes of x, and the gradient by x."""
    x = torch.tensor(x, requires_grad=True)
    result = function(x)
    weights = torch.tensor(inputs["cotangent"] * mask)
    (result * weights).sum().backward()
    return {
        name: result.detach().numpy() * mask,
        f"{name}/gradient": x.grad.numpy(),
    }


def run_verl(inputs, root):
    packages = ["verl", "verl.utils", "verl.trainer", "verl.trainer.ppo"]
    empty = ["omegaconf", "tensordict", "verl.trainer.config", "verl.workers.config"]
    empty += ["verl.utils.device", "verl.utils.import_utils", "verl.workers"]
    groupwise = {"as_torch_index": None, "group_mean_std": None}
    with bare_packages(root, packages, empty, **groupwise):
        core = importlib.import_module("verl.trainer.ppo.core_algos")
        index = np.arange(B) // GROUP
        mask = torch.tensor(inputs["mask"], dtype=torch.float32)
        gappy = torch.tensor(inputs["gappy"], dtype=torch.float32)
        config = types.SimpleNamespace(gamma=GAMMA)
        greedy = torch.tensor(inputs["greedy_rewards"])

        def outcome(function, **settings):
            """Of rewards [B], put on the first token; they are summed there."""

            def of_rewards(rewards):
                on_first = torch.zeros(B, T).index_put(
                    (torch.arange(B), torch.zeros(B, dtype=torch.long)), rewards
                )
                return function(on_first, response_mask=mask, index=index, **settings)[
                    0
                ]

            return of_rewards

        by_rewards = {
            "grpo": outcome(core.compute_grpo_outcome_advantage),
            "dr_grpo": outcome(
                core.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False
            ),
            "rloo": outcome(core.compute_rloo_outcome_advantage),
            "opo": outcome(core.compute_opo_outcome_advantage),
            "reinforce_plus_plus_baseline": outcome(
                core.compute_reinforce_plus_plus_baseline_outcome_advantage
            ),
        }
        plus_plus = core.compute_reinforce_plus_plus_outcome_advantage
        by_token_rewards = {
            "reinforce_plus_plus": (lambda x: plus_plus(x, mask, config)[0], "mask"),
            "discounted_returns": (lambda x: plus_plus(x, mask, config)[1], "mask"),
            "remax": (
                lambda x: core.compute_remax_outcome_advantage(x, greedy, gappy)[0],
                "gappy",
            ),
            "gae_returns": (
                lambda x: core.compute_gae_advantage_return(
                    x * gappy, torch.tensor(inputs["values"]), gappy, GAMMA, LAM
                )[1],
                "gappy",
            ),
        }
        saved = {}
        for name, function in by_rewards.items():
            saved |= value_and_gradient(
                inputs, f"verl/{name}", function, inputs["rewards"], inputs["mask"]
            )
        for name, (function, which) in by_token_rewards.items():
            # verl adds the rewards of padding up too: give it none.
            x = inputs["token_rewards"] * inputs[which]
            saved |= value_and_gradient(
                inputs, f"verl/{name}", function, x, inputs[which]
            )
    return saved


def run_openrlhf(inputs, root):
    packages = ["openrlhf", "openrlhf.utils", "openrlhf.models", "openrlhf.trainer"]
    packages += ["openrlhf.trainer.ppo_utils", "openrlhf.trainer.ray"]
    empty = ["ray", "deepspeed", "openrlhf.trainer.ray.launcher"]
    empty += ["openrlhf.trainer.ppo_utils.experience"]
    saved = {}
    with bare_packages(root, packages, empty):
        maker_of = importlib.import_module(
            "openrlhf.trainer.ppo_utils.experience_maker"
        ).RemoteExperienceMaker
        overlong = importlib.import_module("openrlhf.trainer.ppo_utils.length_penalty")

        def advantages(estimator, gamma):
            def of_rewards(rewards):
                maker = object.__new__(maker_of)
                maker.advantage_estimator = estimator
                maker.kl_ctl = types.SimpleNamespace(value=0.0)
                settings = types.SimpleNamespace(
                    estimator=estimator, gamma=gamma, lambd=LAM, no_std_norm=False
                )
                args = types.SimpleNamespace(
                    algo=types.SimpleNamespace(advantage=settings),
                    rollout=types.SimpleNamespace(n_samples_per_prompt=GROUP),
                    reward=types.SimpleNamespace(clip_range=None),
                )
                maker.strategy = types.SimpleNamespace(args=args)
                experience = types.SimpleNamespace(
                    index=list(range(B)),
                    rewards=rewards,
                    action_mask=torch.tensor(inputs["mask"]),
                    kl=torch.zeros(B, T),
                    info={},
                )
                maker.compute_advantages_and_returns([experience])
                return experience.advantages

            return of_rewards

        names = ["rloo", "reinforce_baseline", "dr_grpo", "group_norm", "reinforce"]
        for name in names:
            saved |= value_and_gradient(
                inputs,
                f"openrlhf/{name}",
                advantages(name, GAMMA if name == "reinforce" else 1.0),
                inputs["rewards"],
                inputs["mask"],
            )
        experience = types.SimpleNamespace(
            rewards=torch.zeros(B), response_length=torch.tensor(inputs["lengths"])
        )
        overlong.apply_overlong_penalty([experience], MAX_LENGTH, BUFFER, FACTOR)
        saved["openrlhf/overlong"] = experience.rewards.numpy()
    return saved


def main():
    verl, openrlhf = (pathlib.Path(x) for x in sys.argv[1:])
    inputs = draw_inputs()
    saved = dict(inputs)
    for scale in ("group", "batch", "none"):
        saved[f"trl/{scale}"] = run_trl(
            inputs, trl.GRPOTrainer, trl.GRPOConfig, scale_rewards=scale
        )
    saved["trl/rloo"] = run_trl(inputs, trl.RLOOTrainer, trl.RLOOConfig)
    punish = get_soft_overlong_punishment(MAX_LENGTH, BUFFER)
    completions = [[1] * n for n in inputs["lengths"]]
    saved["trl/overlong"] = np.float32(punish(completion_ids=completions))
    saved |= run_verl(inputs, verl) | run_openrlhf(inputs, openrlhf)
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **saved)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

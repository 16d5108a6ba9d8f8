"""Make tests/fixtures/losses/constrained.npz by running the trainers of two projects.

Run in an environment with torch, which no test needs:

    python tests/reference/make_constrained_fixtures.py SAFE_RLHF ES_PAPER

SAFE_RLHF is a checkout of https://github.com/PKU-Alignment/safe-rlhf (made with commit
82743cc) and ES_PAPER one of https://github.com/jbejjani2022/es-fine-tuning-paper (made
with 84c16db). Their methods are called as they stand, on a stand-in for the trainer
that holds what they read. Packages that they import and do not use here (deepspeed and
the like) are replaced by mocks.

The file holds (B pairs or sequences, T tokens, S steps):
    costs [2, B, T]  signs, end_index [2, B]    of the safer and the unsafer response
                                                (a sign is +1 for unsafe, -1 for safe)
    regularization
    token_mask [B, T]                           slots that the token-wise loss reads
    sequence/loss [B]   sequence/gradient [2, B]
    token/loss [B]      token/gradient [2, B, T]
        of each pair, as a batch of one; the gradient of the sum over pairs
    scores [2, B]  logprobs, old_logprobs, ref_logprobs, mask [B, T]  kl_coef
    shaped [2, B, T]                            KL-shaped rewards and costs, in the mask
    advantages [2, B, T]  log_multiplier  clip
    actor/loss   actor/gradient [B, T]
    episode_costs [S]  multiplier/* settings
    multiplier/log [S]                          safe-rlhf's log λ, from 0
    scored [S, 2, B]   adaptive/* settings      rewards and costs
    adaptive/multiplier, adaptive/ema [S]  adaptive/combined [S, B]
"""

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import pathlib
import sys
import types
import unittest.mock

import numpy as np
import torch

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "constrained.npz"
B, T, S = 4, 6, 12
MOCKED = ("deepspeed", "optree", "transformers", "tqdm", "requests")


class Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a mock for each package of MOCKED, installed or not."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MOCKED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MockModule(spec.name)

    def exec_module(self, module):
        pass


class MockModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return unittest.mock.MagicMock(name=f"{self.__name__}.{name}")


class ReachedEnd(Exception):  # noqa: N818
    """Raised by a stand-in when the reference has done what was asked of it."""


def load_safe_rlhf(root):
    """The module of the cost trainer and that of the PPO-Lagrangian trainer.

    Their base classes and models are mocked: only methods of their own are called.
    """
    for name in ("safe_rlhf", "safe_rlhf.configs", "safe_rlhf.values"):
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package
    for name in ("datasets", "models", "trainers"):
        sys.modules[f"safe_rlhf.{name}"] = MockModule(f"safe_rlhf.{name}")
    base = type("Base", (), {})
    sys.modules["safe_rlhf.trainers"].SupervisedTrainer = base
    sys.modules["safe_rlhf.trainers"].RLTrainer = base
    names = ("values/cost", "algorithms/ppo_lag")
    return [load(root / "safe_rlhf" / name / "trainer.py") for name in names]


def load(path):
    """The module of a file, without the package it is in."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    lengths = np.array([[6, 4, 3, 2], [5, 6, 3, 4]])
    logprobs, ref_logprobs = -rng.exponential(1.0, (2, B, T)).astype(np.float32)
    ids = np.where(np.arange(T) < lengths[..., None], rng.integers(2, 9, (2, B, T)), 0)
    ids[1, 1:, :1], ids[1, 2, 1] = ids[0, 1:, :1], ids[0, 2, 1]
    return {
        "costs": 2 * normal(2, B, T),
        "signs": np.array([[-1, -1, 1, -1], [1, -1, 1, 1]]),
        "end_index": lengths - 1,
        "ids": ids,
        "regularization": np.float32(0.05),
        "scores": 3 * normal(2, B),
        "logprobs": logprobs,
        "old_logprobs": logprobs - np.float32(0.3) * normal(B, T),
        "ref_logprobs": ref_logprobs,
        "mask": np.arange(T) < lengths[0][:, None],
        "kl_coef": np.float32(0.2),
        "advantages": normal(2, B, T),
        "log_multiplier": np.float32(0.4),
        "clip": np.float32(0.2),
        "episode_costs": normal(S),
        "scored": 2 * normal(S, 2, B),
    }


def run_cost_loss(module, inputs, loss_type):
    """Loss of each pair, and the gradient of their sum on all token costs."""
    costs = torch.tensor(inputs["costs"], requires_grad=True)
    ids = torch.tensor(inputs["ids"])
    attention = ids != 0
    losses = []
    for pair in range(B):
        ends = costs[[0, 1], pair, inputs["end_index"][:, pair]]
        output = types.SimpleNamespace(
            scores=costs[:, pair, :, None], end_scores=ends[:, None]
        )
        trainer = types.SimpleNamespace(
            model=lambda ids, attention_mask, output=output: output,
            args=types.SimpleNamespace(
                loss_type=loss_type, regularization=float(inputs["regularization"])
            ),
        )
        arguments = {}
        for i, side in enumerate(("safer", "unsafer")):
            arguments[f"{side}_input_ids"] = ids[i, [pair]]
            arguments[f"{side}_attention_mask"] = attention[i, [pair]]
            # theirs: +1 for safe, -1 for unsafe
            sign = -torch.tensor(inputs["signs"][i, [pair]])
            arguments[f"{side}_safety_sign"] = sign
        losses.append(module.CostTrainer.loss(trainer, **arguments)["loss"])
    loss = torch.stack(losses)
    (gradient,) = torch.autograd.grad(loss.sum(), costs)
    return loss.detach().numpy(), gradient.numpy()


def run_shaping(module, inputs):
    trainer = types.SimpleNamespace(
        kl_coeff=float(inputs["kl_coef"]), clip_range_score=1e9
    )
    names = ("scores", "logprobs", "ref_logprobs", "mask")
    scores, logprobs, ref, mask = (torch.tensor(inputs[name]) for name in names)
    shaped = module.PPOLagTrainer.add_kl_divergence_regularization(
        trainer, scores[0], scores[1], None, logprobs, ref, mask
    )
    return np.stack([x.numpy() for x in shaped])


def run_actor(module, inputs):
    trainer = types.SimpleNamespace(
        log_lambda=torch.tensor(inputs["log_multiplier"]),
        clip_range_ratio=float(inputs["clip"]),
    )
    logprobs = torch.tensor(inputs["logprobs"], requires_grad=True)
    old, advantages, mask = (
        torch.tensor(inputs[name]) for name in ("old_logprobs", "advantages", "mask")
    )
    loss = module.PPOLagTrainer.actor_loss_fn(
        trainer, logprobs, old, advantages[0], advantages[1], mask
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach().numpy(), gradient.numpy()


def run_multiplier(module, inputs, settings):
    """log λ after each step: the head of `rl_step`, up to its broadcast of λ."""
    log_lambda = torch.nn.Parameter(torch.tensor(0.0))
    trainer = types.SimpleNamespace(
        log_lambda=log_lambda,
        log_lambda_max=np.log(settings["max_multiplier"]),
        log_lambda_optimizer=torch.optim.SGD([log_lambda], lr=settings["lr"]),
        lambda_update_delay_steps=0,
        global_step=0,
        threshold=settings["cost_limit"],
        args=types.SimpleNamespace(device="cpu"),
    )

    def stop(*arguments, **options):
        raise ReachedEnd

    dist = types.SimpleNamespace(
        reduce=lambda *a, **k: None,
        ReduceOp=types.SimpleNamespace(AVG=None),
        broadcast=stop,
    )
    history = []
    with (
        unittest.mock.patch.object(module, "dist", dist),
        unittest.mock.patch.object(module, "is_main_process", lambda: True),
    ):
        for cost in inputs["episode_costs"].tolist():
            trainer.episode_costs = [cost]
            with contextlib.suppress(ReachedEnd):
                module.PPOLagTrainer.rl_step(trainer, {})
            history.append(float(log_lambda.detach()))
    return np.array(history, np.float32)


def run_adaptive(root, inputs, settings):
    """The reward of the ES paper's GRPO trainer, which adapts λ at each call."""
    module = load(root / "alignment" / "GRPO" / "train_grpo_alignment.py")
    reward = module.AdaptiveReward(
        {
            "lambda_adapt": True,
            "lambda_cost": settings["initial"],
            "lambda_lr": settings["lr"],
            "lambda_min": settings["min_multiplier"],
            "lambda_max": settings["max_multiplier"],
            "jc_ema_beta": settings["beta"],
            "cost_threshold_d": -settings["cost_limit"],
            "lambda_pos_cost_only": False,
        }
    )
    found = {"multiplier": [], "ema": [], "combined": []}
    for step in range(S):
        rewards, costs = inputs["scored"][step].tolist()
        module.call_scorer_api = lambda *a, r=rewards, c=costs, **k: (r, c)
        with contextlib.redirect_stdout(io.StringIO()):
            combined = reward(prompts=["p"] * B, completions=["c"] * B)
        found["multiplier"].append(reward.current_lambda)
        found["ema"].append(reward.jc_ema + settings["cost_limit"])
        found["combined"].append(combined)
    return {name: np.array(x, np.float32) for name, x in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("safe_rlhf", type=pathlib.Path)
    parser.add_argument("es_paper", type=pathlib.Path)
    args = parser.parse_args()
    sys.meta_path.insert(0, Mocks())
    cost, lagrangian = load_safe_rlhf(args.safe_rlhf)
    inputs = draw_inputs()
    saved = dict(inputs)
    ids = saved.pop("ids")
    differ = (ids[0] != ids[1]).argmax(1)
    end = inputs["end_index"].max(0)
    slots = np.arange(T)
    saved["token_mask"] = (slots >= differ[:, None]) & (slots <= end[:, None])
    for name in ("sequence", "token"):
        loss, gradient = run_cost_loss(cost, inputs, f"{name}-wise")
        if name == "sequence":
            rows = np.arange(B)
            gradient = np.stack(
                [gradient[i, rows, inputs["end_index"][i]] for i in (0, 1)]
            )
        saved |= {f"{name}/loss": loss, f"{name}/gradient": gradient}
    saved["shaped"] = run_shaping(lagrangian, inputs)
    saved["actor/loss"], saved["actor/gradient"] = run_actor(lagrangian, inputs)
    settings = {"lr": 0.6, "cost_limit": -0.4, "max_multiplier": 1.3}
    saved["multiplier/log"] = run_multiplier(lagrangian, inputs, settings)
    saved |= {f"multiplier/{name}": np.float32(x) for name, x in settings.items()}
    settings = {
        "initial": 0.5,
        "lr": 0.4,
        "cost_limit": -0.3,
        "beta": 0.7,
        "min_multiplier": 0.52,
        "max_multiplier": 0.62,
    }
    history = run_adaptive(args.es_paper, inputs, settings)
    for name, x in (settings | history).items():
        saved[f"adaptive/{name}"] = np.asarray(x, np.float32)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, **saved)
    for name, x in saved.items():
        print(name, np.shape(x), np.ravel(x)[:8])
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

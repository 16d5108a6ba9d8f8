"""Make tests/fixtures/losses/policy.npz: policy losses as TRL and verl compute them.

Run in an environment with torch and trl 1.16 (none is needed by the tests), with the
folder that holds verl's package:

    git clone https://github.com/volcengine/verl
    python tests/reference/make_policy_fixtures.py verl

What verl imports beyond torch and transformers is replaced by empty modules: only its
functions on tensors run. TRL's `GRPOTrainer._compute_loss` runs unbound, on an object
that has the attributes it reads and gives the log-probabilities.

The file holds (B responses of at most T tokens, the last without a real one):
    settings                                        JSON, by case: keyword arguments
    logprobs, old_logprobs, rollout_logprobs [B, T]
    mask [B, T]   advantages [B, T]   row_advantages [B]
    trl/<name>/loss, trl/<name>/gradient [B, T]     name as in `loss_type`, or gspo;
                                                    of the rows with a real token
    trl/<name>_all/...                              the same of all rows
    verl/<name>/loss, verl/<name>/gradient [B, T]
    verl/aggregate/<mode>/loss, .../gradient        of the advantages as a loss
    verl/weights/<level>_<mode> [B, T]
"""

import argparse
import collections
import importlib.abc
import importlib.machinery
import json
import pathlib
import sys
import types
from unittest import mock

import numpy as np
import torch

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "policy.npz"
B, T, MAX_LENGTH = 6, 8, 12
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
SEQUENCE_CLIP = {"clip_low": 0.05, "clip_high": 0.08}
TAU = {"tau_pos": 1.0, "tau_neg": 1.3}
SETTINGS = {
    "trl/grpo": CLIP,
    "trl/bnpo": CLIP,
    "trl/dr_grpo": CLIP,
    "trl/dapo": CLIP,
    "trl/gspo": SEQUENCE_CLIP,
    "trl/cispo": {"ratio_max": 1.2},
    "trl/sapo": TAU,
    "verl/gspo": SEQUENCE_CLIP,
    "verl/cispo": {"ratio_min": 0.8, "ratio_max": 1.28},
    "verl/sapo": TAU,
    "verl/weights": {"low": 0.5, "high": 1.5},
    "max_length": MAX_LENGTH,
}
VERL_MODES = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant_norm": "seq-mean-token-sum-norm",
}


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the named packages as modules whose every attribute is a mock."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if any(name == known or name.startswith(known + ".") for known in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return mock.MagicMock(name=name)

        module.__getattr__ = attribute
        module.__path__ = []
        return module

    def exec_module(self, module):
        if module.__name__ == "verl.workers.config":
            module.ActorConfig = types.SimpleNamespace


def load_verl(folder):
    """verl's `core_algos` and `rollout_corr_helper` from the folder `verl` lies in."""
    names = {"ray", "tensordict", "omegaconf", "hydra", "codetiming"}
    sys.meta_path.insert(0, EmptyModules(names | {"verl.workers", "verl.utils.model"}))
    sys.path.insert(0, str(folder))
    from verl.trainer.ppo import core_algos, rollout_corr_helper

    return core_algos, rollout_corr_helper


def inputs():
    """Ratios on both sides of every bound, rows of mixed advantages, and gaps."""
    rng = np.random.default_rng(11)
    old_logprobs = -rng.exponential(1.5, (B, T))
    drift = rng.normal(0.0, 0.3, (B, T)) + np.array([[0.2, 0.2, -0.2, -0.2, 0, 0]]).T
    mask = rng.random((B, T)) < 0.75
    mask[:-1, 0], mask[-1] = True, False
    arrays = {
        "logprobs": old_logprobs + drift,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": old_logprobs + rng.normal(0.0, 0.5, (B, T)),
        "advantages": rng.normal(0.0, 1.0, (B, T)),
        "row_advantages": np.array([1.2, -0.7, 0.4, -1.5, 0.9, -0.3]),
    }
    return {k: v.astype(np.float32) for k, v in arrays.items()} | {"mask": mask}


def value_and_gradient(function, x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    loss = function(x)
    loss.backward()
    return {"loss": loss.item(), "gradient": x.grad.numpy()}


def trl_trainer(name, settings, *, max_length, **attributes):
    """What `GRPOTrainer._compute_loss` reads of a trainer; `attributes` replace it."""
    accelerator = types.SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        sync_gradients=False,
    )
    read = {
        "loss_type": "grpo" if name == "gspo" else name,
        "importance_sampling_level": "sequence" if name == "gspo" else "token",
        "epsilon_low": settings.get("clip_low"),
        "epsilon_high": settings.get("clip_high", settings.get("ratio_max")),
        "beta": 0.0,
        "max_completion_length": max_length,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "model": types.SimpleNamespace(training=True),
        "accelerator": accelerator,
        "args": types.SimpleNamespace(
            delta=settings.get("dual_clip"),
            steps_per_generation=1,
            use_bias_correction_kl=False,
            sapo_temperature_pos=settings.get("tau_pos"),
            sapo_temperature_neg=settings.get("tau_neg"),
        ),
        "_metrics": {"train": collections.defaultdict(list)},
    }
    return types.SimpleNamespace(**read | attributes)


def trl_compute(trainer, logprobs, entropies, mask, **batch):
    """`GRPOTrainer._compute_loss` of responses that say this, all [B, T]."""
    from trl import GRPOTrainer

    said = (logprobs, entropies, None)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: said
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs | batch)


def trl_loss(name, arrays, mask):
    """TRL's own loss in double precision, and its gradient in log π."""
    double = {k: torch.tensor(v, dtype=torch.float64) for k, v in arrays.items()}
    mask = torch.tensor(mask)
    trainer = trl_trainer(name, SETTINGS[f"trl/{name}"], max_length=MAX_LENGTH)

    def loss(logprobs):
        return trl_compute(
            trainer,
            logprobs,
            torch.zeros_like(logprobs),
            mask,
            advantages=double["row_advantages"],
            old_per_token_logps=double["old_logprobs"],
        )

    return value_and_gradient(loss, arrays["logprobs"])


def verl_loss(core_algos, name, arrays):
    settings = SETTINGS[f"verl/{name}"]
    double = {k: torch.tensor(v, dtype=torch.float64) for k, v in arrays.items()}
    # its clip ratios are distances from one, here those of the bounds
    config = types.SimpleNamespace(
        clip_ratio=None,
        clip_ratio_low=settings.get("clip_low", 1 - settings.get("ratio_min", 1)),
        clip_ratio_high=settings.get("clip_high", settings.get("ratio_max", 1) - 1),
        tau_pos=settings.get("tau_pos"),
        tau_neg=settings.get("tau_neg"),
        global_batch_info={},
    )
    function = core_algos.get_policy_loss_fn(name)

    def loss(logprobs):
        return function(
            double["old_logprobs"],
            logprobs,
            double["advantages"],
            double["mask"],
            config=config,
        )[0]

    return value_and_gradient(loss, arrays["logprobs"])


def verl_weights(helper, arrays):
    """Both levels, truncated at the upper bound, and rejected outside of both."""
    low, high = SETTINGS["verl/weights"].values()
    log_ratio = torch.tensor(arrays["old_logprobs"], dtype=torch.float64) - (
        torch.tensor(arrays["rollout_logprobs"], dtype=torch.float64)
    )
    mask = torch.tensor(arrays["mask"]).double()
    results = {}
    for level, statistic in (("token", "token_k1"), ("sequence", "seq_sum_k1")):
        weights = helper.compute_rollout_correction_weights
        results[f"{level}_truncate"], _ = weights(log_ratio, mask, level, high)
        unbounded, _ = weights(log_ratio, mask, level, 1e6)
        # k1 is minus the log-ratio: the bounds change places
        kept, _ = helper.compute_rollout_rejection_mask(
            log_ratio, mask, statistic, f"{1 / high}_{1 / low}"
        )
        results[f"{level}_mask"] = unbounded * kept
    return {name: x.numpy() for name, x in results.items()}


def main(folder):
    """Write the file."""
    arrays = inputs()
    real = arrays["mask"].any(1)
    results = {}

    def add(prefix, pair):
        for key, value in pair.items():
            results[f"{prefix}/{key}"] = np.asarray(value, np.float64)

    for case in SETTINGS:
        if case.startswith("trl/"):
            name = case.removeprefix("trl/")
            kept = {k: v[real] for k, v in arrays.items()}
            add(case, trl_loss(name, kept, kept["mask"]))
            add(f"{case}_all", trl_loss(name, arrays, arrays["mask"]))

    core_algos, helper = load_verl(folder)
    for name in ("gspo", "cispo", "sapo"):
        add(f"verl/{name}", verl_loss(core_algos, name, arrays))
    mask = torch.tensor(arrays["mask"]).double()
    for mode, its_name in VERL_MODES.items():
        function = core_algos.agg_loss
        add(
            f"verl/aggregate/{mode}",
            value_and_gradient(
                lambda x, f=function, m=its_name: f(
                    x, mask, m, loss_scale_factor=MAX_LENGTH
                ),
                arrays["advantages"],
            ),
        )
    add("verl/weights", verl_weights(helper, arrays))

    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, settings=json.dumps(SETTINGS), **arrays, **results)
    print(f"{OUT}: {len(arrays) + len(results)} arrays, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verl", help="the folder that holds verl's package")
    main(pathlib.Path(parser.parse_args().verl).resolve())

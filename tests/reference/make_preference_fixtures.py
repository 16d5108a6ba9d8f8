"""Make tests/fixtures/losses/preference.npz: losses of TRL, OpenRLHF and Transformers.

Run in an environment with torch, transformers and trl 1.16 (the tests need none of
them), with a checkout of OpenRLHF (of August 2026) beside it:

    python tests/reference/make_preference_fixtures.py path/to/OpenRLHF

The trainers' own loss methods are called, on a model that only recites given
log-probabilities, in double precision (float32 where TRL knows no other).

The file holds (B pairs, T tokens; chosen responses first, rejected ones second):
    logprobs, ref_logprobs, log_sum_squares, mask [2, B, T]
    labels [2, B], kl_logprobs, kl_ref_logprobs [2, B, T]   for KTO, of mismatched pairs
    logits [B, T, V], targets [B, T]                        for label smoothing
    cases                  JSON: a case's name -> [function, our hyper-parameters]
    <case>/losses [B]      of each pair alone, where a batch of one makes sense
    <case>/loss            of the whole batch, as the library averages it
    <case>/gradient        of that loss, in logprobs (in logits for label smoothing)
"""

import importlib.util
import json
import pathlib
import sys
import types
from collections import defaultdict

import numpy as np
import torch
import trl
from transformers.trainer_pt_utils import LabelSmoother
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

OUT = pathlib.Path(__file__).parents[1] / "fixtures" / "losses" / "preference.npz"
B, T, V = 5, 6, 7
LENGTHS = [[6, 3, 1, 5, 4], [4, 6, 3, 5, 2]]
BETA = {"beta": 0.3}
# In our names.
DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.05},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"tau": 0.5},
    "sft": {},
    "sigmoid_norm": {},
}
CASES = {name: ("dpo", {"loss_type": name, **BETA, **x}) for name, x in DPO.items()}
for kind in ("sigmoid", "hinge", "ipo", "discopop"):
    for divergence in ("forward_kl", "js", "alpha"):
        options = {"divergence": divergence, "loss_type": kind, **BETA, **DPO[kind]}
        options |= {"alpha": 0.3} if divergence == "alpha" else {}
        CASES[f"{kind}_{divergence}"] = ("dpo", options)
for name in ("sigmoid", "apo_zero"):
    CASES[f"{name}_wpo"] = ("wpo", {"loss_type": name, **BETA})
    CASES[f"{name}_ld"] = ("ld", {"loss_type": name, **BETA, "ld_alpha": 0.4})
CASES["cdpo"] = ("openrlhf", {"loss_type": "sigmoid", **BETA, "label_smoothing": 0.2})
CASES["ipo_sum"] = ("openrlhf", {"loss_type": "ipo_sum", **BETA})
KTO = {**BETA, "desirable_weight": 1.5, "undesirable_weight": 0.7}
CASES["kto"] = ("kto", KTO)
CASES["apo_zero_unpaired"] = ("apo_zero_unpaired", KTO)
CASES["orpo"] = ("orpo", BETA)
SIMPO = {"beta": 2.5, "gamma": 0.8}
CASES["simpo"] = ("simpo", SIMPO)
CASES["simpo_smooth"] = ("simpo", {**SIMPO, "label_smoothing": 0.1})
CASES["alphapo"] = ("simpo", {**SIMPO, "alpha": 0.25})
CASES["cpo"] = ("cpo", {**BETA, "nll_coef": 0.0})
CASES["cpo_smooth"] = ("cpo", {**BETA, "nll_coef": 0.0, "label_smoothing": 0.1})
CASES["cpo_nll"] = ("cpo", {**BETA, "nll_coef": 0.7})
CASES["dft"] = ("dft", {})
CASES["label_smoothing"] = ("label_smoothing", {"label_smoothing": 0.1})


def draw_inputs():
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(1.0, (2, B, T))
    logits = rng.normal(0.0, 2.0, (B, T, V))
    inputs = {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + rng.normal(0.0, 0.8, (2, B, T)),
        "log_sum_squares": -rng.exponential(1.0, (2, B, T)),
        "kl_logprobs": -rng.exponential(1.0, (2, B, T)),
        "kl_ref_logprobs": -0.2 - rng.exponential(1.2, (2, B, T)),
        "logits": logits,
    }
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    inputs["mask"] = np.arange(T) < np.array(LENGTHS)[:, :, None]
    inputs["labels"] = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]], bool)
    inputs["targets"] = rng.integers(0, V, (B, T)).astype(np.int32)
    return inputs


class Recital(torch.nn.Module):
    """A model that gives [N, T] log-probabilities, whatever it is asked.

    Asked for one token more, it gives kl: that is how the two forward passes of KTO
    are told apart here.
    """

    is_gradient_checkpointing = False

    def __init__(self, logprobs, kl=None, log_sum_squares=None):
        super().__init__()
        self.logprobs, self.kl, self.log_sum_squares = logprobs, kl, log_sum_squares
        self.eval()

    def forward(self, input_ids, **_):
        x = self.logprobs if input_ids.shape[1] == T + 1 else self.kl
        return types.SimpleNamespace(
            log_probs=x,
            log_sum_sq_probs=self.log_sum_squares,
            entropy=torch.zeros_like(x),
            mean_logits=torch.zeros_like(x),
            is_top1=torch.zeros_like(x).bool(),
            label_mask=x != 0,
        )


def stub(cls, **attributes):
    """A trainer of which only the loss is to be called."""
    trainer = object.__new__(cls)
    trainer.accelerator = types.SimpleNamespace(
        device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
    )
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer.args = types.SimpleNamespace(
        gradient_checkpointing_kwargs=None,
        average_tokens_across_devices=False,
        max_length=None,
        **attributes.pop("args", {}),
    )
    defaults = {"aux_loss_enabled": False, "precompute_ref_logps": False}
    defaults |= {"_total_train_tokens": 0}
    for name, value in (defaults | attributes).items():
        setattr(trainer, name, value)
    return trainer


def tokens(mask, extra=0):
    """Token ids and a completion mask of [N, T + 1 + extra], of one prompt token."""
    mask = torch.cat([torch.zeros(len(mask), 1 + extra), mask.double()], dim=1)
    mask = mask.long()
    return {
        "input_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "attention_mask": torch.ones_like(mask),
    }


def dpo(x, beta, loss_type, ld_alpha=None, weigh=False, **options):
    """TRL's DPOTrainer._compute_loss."""
    names = {"js": "js_divergence", "alpha": "alpha_divergence"}
    divergence = options.get("divergence", "reverse_kl")
    # TRL's coefficient is one minus the paper's α; and it knows float32 alone there.
    dtype = torch.float32 if divergence == "alpha" else torch.float64
    joined = {name: value.flatten(0, 1).to(dtype) for name, value in x.items()}
    mask = joined["mask"]
    reference = Recital(joined["ref_logprobs"] * mask)
    trainer = stub(
        trl.DPOTrainer,
        ref_model=reference,
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=options.get("label_smoothing", 0.0),
        f_divergence_type=names.get(divergence, divergence),
        f_alpha_divergence_coef=1.0 - options.get("alpha", 0.5),
        ld_alpha=ld_alpha,
        use_weighting=weigh,
        args={"discopop_tau": options.get("tau")},
    )
    log_sum_squares = joined["log_sum_squares"]
    model = Recital(joined["logprobs"] * mask, log_sum_squares=log_sum_squares)
    trainer.model = model
    return trainer._compute_loss(model, tokens(mask), return_outputs=False)


def kto(x, loss_type="kto", **options):
    """TRL's KTOTrainer._compute_loss, the responses in one batch of 2 B."""
    joined = {name: value.flatten(0, 1) for name, value in x.items()}
    mask = joined["mask"]
    trainer = stub(
        trl.KTOTrainer,
        ref_model=Recital(joined["ref_logprobs"] * mask, joined["kl_ref_logprobs"]),
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        **options,
    )
    model = Recital(joined["logprobs"] * mask, joined["kl_logprobs"])
    trainer.model = model
    inputs = {**tokens(mask), "label": joined["labels"].bool()}
    others = tokens(torch.ones_like(mask), extra=1)
    inputs |= {f"KL_{name}": value for name, value in others.items()}
    return trainer._compute_loss(model, inputs, return_outputs=False)


def openrlhf(x, loss_module, beta, loss_type, label_smoothing=0.0):
    sums = [(x[name] * x["mask"]).sum(-1) for name in ("logprobs", "ref_logprobs")]
    loss = loss_module.DPOLoss(beta, label_smoothing, ipo=loss_type == "ipo_sum")
    return loss(*sums[0], *sums[1])[0]


def reference_free(x, cls, mean, nll, **attributes):
    """get_batch_loss_metrics of TRL's ORPOTrainer or CPOTrainer."""
    logps = (x["logprobs"] * x["mask"]).sum(-1)
    if mean:
        logps = logps / x["mask"].sum(-1)
    trainer = stub(cls, **attributes)
    logits = torch.zeros(1)
    trainer.concatenated_forward = lambda *_: (*logps, logits, logits, nll(logps))
    return trainer.get_batch_loss_metrics(None, None)[0]


def orpo(x, beta):
    return reference_free(x, ORPOTrainer, True, lambda p: -p[0].mean(), beta=beta)


def cpo(x, beta, nll_coef, loss_type="sigmoid", gamma=0.0, **options):
    return reference_free(
        x,
        CPOTrainer,
        loss_type == "simpo",
        lambda p: -p[0].mean(),
        beta=beta,
        cpo_alpha=nll_coef,
        loss_type=loss_type,
        simpo_gamma=gamma,
        label_smoothing=options.get("label_smoothing", 0.0),
        alpha=options.get("alpha", 0.0),
    )


def dft(x):
    """TRL's SFTTrainer.compute_loss."""
    mask = x["mask"].flatten(0, 1)
    trainer = stub(
        trl.SFTTrainer,
        args={"loss_type": "dft"},
        compute_loss_func=None,
        label_smoother=None,
    )
    trainer.accelerator.parallelism_config = None
    model = Recital(x["logprobs"].flatten(0, 1) * mask)
    trainer.model = model
    return trainer.compute_loss(model, tokens(mask), return_outputs=False)


def smooth(x, label_smoothing):
    """The cross-entropy of Transformers' Trainer, on the chosen responses."""
    labels = torch.where(x["mask"][0] > 0, x["targets"].long(), -100)
    return LabelSmoother(label_smoothing)({"logits": x["logits"]}, labels)


def load_openrlhf(checkout):
    """openrlhf/models/loss.py alone: the package around it wants much more."""
    name = "openrlhf_models"
    package = types.ModuleType(name)
    package.__path__ = []
    utils = types.ModuleType(f"{name}.utils")
    utils.masked_mean = None  # no part of DPOLoss
    sys.modules |= {name: package, utils.__name__: utils}
    path = pathlib.Path(checkout) / "openrlhf" / "models" / "loss.py"
    spec = importlib.util.spec_from_file_location(f"{name}.loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(checkout):
    inputs = draw_inputs()
    loss_module = load_openrlhf(checkout)
    functions = {
        "dpo": dpo,
        "ld": dpo,
        "wpo": lambda x, **options: dpo(x, weigh=True, **options),
        "openrlhf": lambda x, **options: openrlhf(x, loss_module, **options),
        "kto": kto,
        "apo_zero_unpaired": lambda x, **o: kto(x, "apo_zero_unpaired", **o),
        "orpo": orpo,
        "simpo": lambda x, **o: cpo(x, nll_coef=0.0, loss_type="simpo", **o),
        "cpo": cpo,
        "dft": dft,
        "label_smoothing": smooth,
    }
    by_batch = {"kto", "apo_zero_unpaired", "dft", "label_smoothing"}
    results = {}
    for name, (function, options) in CASES.items():
        x = {key: torch.tensor(value).double() for key, value in inputs.items()}
        leaf = x["logits" if function == "label_smoothing" else "logprobs"]
        leaf.requires_grad_()
        loss = functions[function](x, **options)
        loss.backward()
        results[f"{name}/loss"] = loss.item()
        results[f"{name}/gradient"] = leaf.grad.numpy()
        if function not in by_batch and not name.startswith("aot"):
            x = {k: v for k, v in x.items() if k not in ("logits", "targets")}
            rows = [{k: v[:, [i]] for k, v in x.items()} for i in range(B)]
            losses = [functions[function](row, **options).item() for row in rows]
            results[f"{name}/losses"] = losses
    cases = np.array(json.dumps(CASES))
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, cases=cases, **inputs, **results)
    print(f"{OUT}: {len(CASES)} cases, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])

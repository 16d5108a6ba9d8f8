"""adapter_config.json of PEFT: what is read, what is refused, what is written.

Read are plain LoRA adapters, ΔW = (α/r) B A or (α/√r) B A. Any setting that would mean
more than that is refused by its name.

References:
    https://huggingface.co/docs/peft/package_reference/lora
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

SETTINGS = "adapter_config.json"
# Settings under which the files would mean more than ΔW, and the value that does not.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
# All other ways to start an adapter change the weights under it.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# PEFT itself asks for both to be saved with a sequence classifier.
HEADS = ("score", "classifier")


def read_settings(path: Path) -> dict[str, Any]:
    """The parsed adapter_config.json.

    Raises:
        UserError: there is none, it is broken, or the adapter is not a plain one.
    """
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} has no {SETTINGS}: not an adapter.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no JSON object.")
    wrong = {
        name: settings[name]
        for name, plain in PLAIN.items()
        if settings.get(name) not in (plain, None)
    }
    if settings.get("init_lora_weights") not in PLAIN_STARTS:
        wrong["init_lora_weights"] = settings["init_lora_weights"]
    saved = settings.get("modules_to_save") or ()
    if any(name not in HEADS for name in saved):
        wrong["modules_to_save"] = saved
    if wrong:
        found = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise UserError(
            f"Unsupported in {path}: {found}; supported are LoRA adapters with "
            "bias='none', nothing but score in modules_to_save, and a start that left "
            "the weights under them as they were."
        )
    _check_numbers(path, settings)
    return settings


def _check_numbers(path, settings):
    """Refuse ranks, alphas and their patterns that are none."""
    for name, pattern, kinds in [
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", int | float),
    ]:
        table = settings.get(pattern) or {}
        if not isinstance(table, dict):
            raise UserError(f"{path} has the {pattern} {table!r}; it must be a table.")
        for key in table:
            try:
                re.compile(key)
            except re.error as error:
                raise UserError(
                    f"{path}, {pattern}: {key!r} is no regular expression ({error})."
                ) from error
        for value in [settings.get(name, 8), *table.values()]:
            number = isinstance(value, kinds) and not isinstance(value, bool)
            if not number or value <= 0:
                raise UserError(
                    f"{path} has the {name} {value!r}; it must be a number above 0."
                )


def rank_and_scale(settings: Mapping[str, Any], module: str = "") -> tuple[int, float]:
    """(r, α/r) of a module, or by default of those that no pattern names."""

    def pick(patterns, default):
        for pattern, value in (settings.get(patterns) or {}).items():
            # As PEFT matches them.
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    rank = pick("rank_pattern", settings.get("r", 8))
    alpha = pick("alpha_pattern", settings.get("lora_alpha", 8))
    # Rank-stabilised: https://arxiv.org/abs/2312.03732
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def module_settings(
    ranks: Mapping[str, int], modules: Iterable[str], *, rank: int, alpha: float
) -> dict[str, Any]:
    """The settings that tell which modules have an adapter, their ranks and scales.

    Args:
        ranks: for each module of the adapter its rank; the scale of all is α/r.
        modules: all linear modules of the model, "{}" for the layer.
        rank: r.
        alpha: α.
    """

    def short(name):
        """The end of a module's name that no other module shares."""
        *_, parent, last = name.split(".")
        alone = sum(other.endswith(f".{last}") for other in modules) == 1
        return last if alone else f"{parent}.{last}"

    def whole(number):
        return int(number) if number == int(number) else number

    other = {short(name): r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": whole(alpha),
        "target_modules": [short(name) for name in ranks],
        "rank_pattern": other,
        "alpha_pattern": {name: whole(alpha * r / rank) for name, r in other.items()},
    }

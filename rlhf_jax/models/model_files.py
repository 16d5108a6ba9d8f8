"""The files of a Hugging Face model directory: where they are and what they hold.

Pickled weights (pytorch_model.bin) are never opened.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rlhf_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONVERT = (
    "save it again as safetensors: transformers' from_pretrained and save_pretrained "
    "do so where PyTorch is installed"
)


class Tensor(NamedTuple):
    """Where a checkpoint tensor lies."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str


def is_hub_id(source: str) -> bool:
    """Whether a source has the form of a repository on the hub, as "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def find_model(source: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model: `source` itself, or the hub's files in the cache.

    Without `weights` config.json alone is fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"{name} is not a model directory: give one with a config.json and "
            "*.safetensors, or a hub id as owner/name."
        )
    # Imported here: only a hub id needs it, and it is slow to load.
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", *(["*.safetensors", INDEX] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub client's errors share no base class
        raise UserError(
            f"{name} is neither a directory here nor a model that could be had from "
            f"the Hugging Face hub ({type(error).__name__})."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory."""
    path = directory / "config.json"
    try:
        hf_config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} has no config.json: not a model.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(hf_config, dict):
        raise UserError(f"{path} holds no JSON object.")
    return hf_config


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory by name; nothing is read yet."""
    index = directory / INDEX
    if (directory / SINGLE).exists():
        files = [SINGLE]
    elif index.exists():
        try:
            places = json.loads(index.read_text("utf-8"))["weight_map"]
            files = sorted(set(places.values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is broken: {error!r}.") from error
    elif any(directory.glob("*.bin")):
        raise UserError(
            f"{directory} holds its weights only as pickles (*.bin), which can run "
            f"code and are never opened; {CONVERT}."
        )
    else:
        raise UserError(
            f"{directory} holds no weights ({SINGLE} or {INDEX}); if the model has "
            f"them as pickles (*.bin), {CONVERT}."
        )
    tensors = {}
    for name in files:
        tensors.update(_open_file(directory / name))
    return tensors


def _open_file(path: Path) -> dict[str, Tensor]:
    try:
        file = safe_open(path, framework="numpy")
        return {
            name: Tensor(file, name, tuple(s.get_shape()), s.get_dtype())
            for name in file.keys()  # noqa: SIM118  (it is not a mapping)
            for s in [file.get_slice(name)]
        }
    except FileNotFoundError:
        raise UserError(f"{path} is missing though {INDEX} names it.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or corrupt: {error}.") from error

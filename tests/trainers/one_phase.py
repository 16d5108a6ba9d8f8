"""What the tests of a single phase share: its model, inputs, meshes and distances."""

import functools
import json
import pathlib
import tempfile

import jax
import numpy as np
from jax.sharding import AxisType
from safetensors.numpy import save_file

from rlhf_jax import sharding
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.rollout.generate import Responses
from rlhf_jax.rollout.logprobs import Transcript

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SOURCE = FIXTURES / "families" / "llama"
SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def load_fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return dict(arrays)


def single_mesh():
    """A mesh of one device, where eight are to be had."""
    axis_types = (AxisType.Auto,) * 3
    return jax.make_mesh(
        (1, 1, 1), sharding.AXES, axis_types=axis_types, devices=jax.devices()[:1]
    )


def rollout_of(arrays, mesh):
    """(transcript, samples, scores) on the mesh, as a sampler and a reward give it.

    The sampler's log-probabilities are the fixture's old ones.
    """
    names = (
        *("prompts", "prompt_mask", "responses", "mask"),
        *("finished", "scores", "old_logprobs"),
    )
    columns = sharding.to_devices([arrays[name] for name in names], sharding.rows(mesh))
    *transcript, finished, scores, old_logprobs = columns
    transcript = Transcript(*transcript)
    samples = Responses(transcript.responses, transcript.mask, old_logprobs, finished)
    return transcript, samples, scores


def from_hf(tensors):
    """Our weights from tensors under HF's names, through the files of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/model.safetensors")
        hf_config = json.loads((SOURCE / "config.json").read_text())
        pathlib.Path(folder, "config.json").write_text(json.dumps(hf_config))
        return load_pretrained(folder, head=None).params


def starting_with(arrays, prefix):
    """The arrays whose names start so, without the prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def shard_shapes(tree):
    """The shape of each array as it lies on one device."""
    return jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), tree)


def distance(tree, other):
    """max |a − b| / max(1, |b|) over all leaves."""
    far = lambda a, b: np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b)), initial=0.0)
    return max(jax.tree.leaves(jax.tree.map(far, tree, other)))

"""Packaging of rlhf_jax; `pip install -e .` installs all that the main job needs."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (ROOT / "rlhf_jax" / "__init__.py").read_text("utf-8")
).group(1)

BASE = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11.30",
    "transformers>=5.0",
    "datasets>=4.0",
    "numpy>=2.0",
    "chex>=0.1.90",
    "tensorflow-datasets>=4.9.8",
    "importlib_resources>=6.4",  # tensorflow-datasets uses it and does not ask for it
    "ml-collections>=1.0",
    "absl-py>=2.1",
    "grain>=0.2.13",
    "safetensors>=0.6",
    "tokenizers>=0.21",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "scipy>=1.13",
    "rich>=13.9",
    "vaderSentiment>=3.3.2",
]
EXTRAS = {
    "cuda12": ["jax[cuda12]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "tensorboard": ["tensorboardX>=2.6"],
    "wandb": ["wandb>=0.19"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.34"],
    "judge": ["openai>=1.60"],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.130",
        "ruff>=0.13",
        "tensorboardX>=2.6",
    ],
}

setup(
    name="rlhf_jax",
    version=VERSION,
    description="Alignment of language models from human feedback, in JAX",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlhf_jax", "rlhf_jax.*"]),
    package_data={"rlhf_jax": ["builtin/**/*"]},
    install_requires=BASE,
    extras_require=EXTRAS,
)

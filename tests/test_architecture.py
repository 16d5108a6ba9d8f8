"""Imports point down only: the layers of the package, read from its source."""

import ast
import importlib.util
import pathlib
import sys
import textwrap

import pytest

PACKAGE = "rlhf_jax"
SOURCE = pathlib.Path(__file__).parents[1] / PACKAGE

LAYERS = [
    {"losses", "backend", "errors", "command_line"},
    {"models", "sharding", "hosts", "keys", "trees"},
    {
        *("data", "checkpoint", "loading", "memory", "metrics", "monitor", "plots"),
        *(
            "compilations",
            "nonfinite",
            "preemption",
            "preflight",
            "progress",
            "run_files",
            "text_signals",
        ),
        *("trainable", "watch"),
    },
    {"rollout", "rewards"},
    {"evaluation", "analysis"},
    {"trainers"},
    # command lines
    {"train", "pipeline", "evaluate", "analyze", "explore", "export", "serve", "plan"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# what the files of the algorithms share; every other file of trainers/ is an algorithm
SHARED_BY_TRAINERS = {
    *("common", "informative", "minibatches", "offline", "online", "optimizer"),
    *("grpo_settings", "dpo_settings", "reference", "rollback"),
}


def module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((PACKAGE, *parts)).removesuffix(".__init__")


def modules_of(root):
    return {module_name(path, root): path for path in sorted(root.rglob("*.py"))}


def imports(module, path, modules):
    """(line, imported module) of every import, inside functions and TYPE_CHECKING too.

    `from a.b import c` is a.b.c where that is a module of the package, else a.b.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        if isinstance(node, ast.ImportFrom):
            parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
            dotted = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dotted, parent)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in modules else base


def complaint(module, imported):
    """Why this module must not import that one, or None."""
    inside = module.split(".")[1:]
    part = inside[0] if inside else None
    parts = imported.split(".")
    top = parts[0]
    if part is None:
        return "the package itself imports nothing, to stay light"
    if part not in LEVEL:
        return f"{part} has no layer: give it one in LAYERS of this test"
    if top == "flax" and part != "models":
        return "flax is for models/ alone"
    if part == "losses":
        ours = parts[:2] == [PACKAGE, "losses"]
        if not ours and top not in {"jax", "numpy"} | set(sys.stdlib_module_names):
            return "losses import jax and numpy only"
    if top != PACKAGE or len(parts) == 1:
        return None
    if parts[1] not in LEVEL:
        return f"{parts[1]} has no layer: give it one in LAYERS of this test"
    if LEVEL[parts[1]] > LEVEL[part]:
        return f"it points up, from layer {LEVEL[part]} to layer {LEVEL[parts[1]]}"
    if part == parts[1] == "trainers" and len(inside) > 1 and len(parts) > 2:
        algorithm = parts[2] not in SHARED_BY_TRAINERS
        if algorithm and parts[2] != inside[1]:
            return "trainers share common code, and never import each other"
    return None


def violations(root):
    """One line for each import that breaks a rule: where, what and why."""
    modules = modules_of(root)
    found = []
    for module, path in modules.items():
        for line, imported in imports(module, path, modules):
            why = complaint(module, imported)
            if why:
                found.append(f"{path.relative_to(root)}:{line} {imported}: {why}")
    return found


def test_imports_point_down():
    assert len(modules_of(SOURCE)) > 8
    assert violations(SOURCE) == []


def test_every_module_has_a_layer():
    parts = {module.split(".")[1] for module in modules_of(SOURCE) if "." in module}
    assert sorted(parts - set(LEVEL)) == []


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("losses/kl.py", "import optax", "jax and numpy only"),
        ("losses/kl.py", "from rlhf_jax.errors import UserError", "jax and numpy only"),
        ("losses/kl.py", "from .. import sharding", "jax and numpy only"),
        ("losses/kl.py", "from ..models import layers", "jax and numpy only"),
        ("models/layers.py", "from rlhf_jax import checkpoint", "points up"),
        ("sharding.py", "import rlhf_jax.rollout.generate", "points up"),
        ("data/texts.py", "def f():\n  from rlhf_jax import rewards", "points up"),
        ("rewards/model.py", "from rlhf_jax.trainers.common import Run", "points up"),
        ("evaluation/heldout.py", "from rlhf_jax.trainers import ppo", "points up"),
        ("trainers/ppo.py", "from rlhf_jax import train", "points up"),
        ("trainers/ppo.py", "from flax import nnx", "models/ alone"),
        ("trainers/ppo.py", "from rlhf_jax.trainers import sft", "each other"),
        ("trainers/ppo.py", "from rlhf_jax.trainers.sft import run", "each other"),
        ("trainers/ppo.py", "from . import common, sft", "each other"),
        ("trainers/common.py", "from .sft import run", "each other"),
        ("__init__.py", "import jax", "stay light"),
        ("extras.py", "import jax", "no layer"),
        ("train.py", "from rlhf_jax import extras", "no layer"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, path, source, why):
    for name in ("checkpoint", "extras", "sharding", "train", "trainers/sft"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").touch()
    for name in ("rewards", "trainers"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "trainers" / "ppo.py").touch()
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source, "utf-8")
    (found,) = violations(tmp_path)
    assert found.startswith(path)
    assert why in found


def test_what_is_allowed_is_not_found(tmp_path):
    sources = {
        "losses/kl.py": """
            import functools, jax, numpy
            from jax import lax
            from rlhf_jax.losses import masked
            from . import masked
            """,
        "losses/masked.py": "import jax.numpy as jnp",
        "models/layers.py": "from flax import linen as nn\nimport optax",
        "trainers/common.py": "from rlhf_jax import losses, checkpoint",
        "trainers/ppo.py": "from rlhf_jax.trainers import common\nimport optax",
        "train.py": "from rlhf_jax.trainers import ppo\nfrom rlhf_jax import errors",
    }
    for path, source in sources.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(textwrap.dedent(source), "utf-8")
    assert violations(tmp_path) == []

"""Tells how much memory a run will need on each device, without the devices.

    python -m rlhf_jax.plan --config=configs/grpo.py
    python -m rlhf_jax.plan --config=configs/grpo.py --config.model=Qwen/Qwen3-8B \\
        --config.mesh.fsdp=8 --config.dtype=bfloat16 --devices=8 --gib=60 \\
        --platform=gpu

Shapes alone are looked at: of a model on the hub only config.json is fetched, and no
program is compiled. A run that does not fit is an error that says what to change.
"""

from collections.abc import Callable

import jax
from absl import flags
from ml_collections import ConfigDict

from rlhf_jax import preflight, progress, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.train import run_with_config


def plan(
    config: ConfigDict,
    *,
    devices: int | None = None,
    gib: float | None = None,
    platform: str | None = None,
) -> None:
    """Prints the plan; the flags of the command line say what the arguments are.

    Raises:
      UserError: the run does not fit, the mesh does not fit the devices, or a model is
        not found.
    """
    if config.algorithm == "pipeline":
        raise UserError("a pipeline has several runs: give the config of one of them")
    mesh = sharding.abstract_mesh(devices or jax.device_count(), **config.mesh)
    available = int(gib * 2**30) if gib else None
    if not gib and not devices:
        available = preflight.capacity(sharding.make_mesh(**config.mesh))
    sizes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    rows, advice = preflight.rows(config, mesh, available, platform)
    console = progress.make_console()
    title = f"rlhf_jax {config.algorithm}"
    progress.show_plan(console, title, [("mesh", sizes), *rows])
    if advice is not None:
        raise UserError(advice)


def main() -> None:
    """The command line."""
    flags.DEFINE_integer("devices", None, "How many; by default those here.", 1)
    flags.DEFINE_float(
        "gib",
        None,
        "Memory of each that JAX may take, of a GPU three quarters unless "
        "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; by default of those here.",
        0,
    )
    platforms = ["cpu", "gpu", "tpu"]
    flags.DEFINE_enum("platform", None, platforms, "By default of those here.")

    def command(read_config: Callable[[], ConfigDict]) -> None:
        given = {name: flags.FLAGS[name].value for name in plan.__kwdefaults__}
        plan(read_config(), **given)

    run_with_config(command)


if __name__ == "__main__":
    main()

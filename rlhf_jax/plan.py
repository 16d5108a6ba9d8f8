"""Tells how much memory a run will need on each device, without the devices.

    python -m rlhf_jax.plan --config=configs/grpo.py
    python -m rlhf_jax.plan --config=configs/grpo.py --config.model=Qwen/Qwen3-8B \\
        --config.mesh.fsdp=8 --config.dtype=bfloat16 --devices=8 --gib=60 \\
        --platform=gpu

Shapes alone are looked at: of language models on the hub only config.json is fetched,
and no program is compiled. What training would refuse is refused, and a run that does
not fit is an error that says what to change.
"""

from collections.abc import Callable

import jax
from absl import flags
from ml_collections import ConfigDict

from rlhf_jax import preflight, progress, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.train import algorithm_of, run_with_config


def plan(
    config: ConfigDict,
    *,
    devices: int | None = None,
    gib: float | None = None,
    platform: str | None = None,
) -> None:
    """Prints the plan.

    Args:
      config: of a run.
      devices: how many; None for those here.
      gib: memory of each; None for that of those here, or without a bound if `devices`
        is given.
      platform: "cpu", "gpu" or "tpu"; None for that of the devices here.

    Raises:
      UserError: training would refuse the config, the run does not fit, or a model is
        not found.
    """
    if config.algorithm == "pipeline":
        raise UserError("a pipeline has several runs: give the config of one of them")
    mesh = sharding.abstract_mesh(devices or jax.device_count(), **config.mesh)
    available = None if gib is None else int(gib * 2**30)
    if gib is None and devices is None:
        available = preflight.capacity(sharding.make_mesh(**config.mesh))
    with algorithm_of(config) as algorithm:
        algorithm.validate(config, mesh)
        rows, advice = preflight.rows(config, mesh, available, platform)
    sizes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
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
        "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; by default that of those here, "
        "or no bound if --devices is given.",
        0.001,
    )
    platforms = ["cpu", "gpu", "tpu"]
    flags.DEFINE_enum("platform", None, platforms, "By default of those here.")

    def command(read_config: Callable[[], ConfigDict]) -> None:
        given = {name: flags.FLAGS[name].value for name in plan.__kwdefaults__}
        plan(read_config(), **given)

    run_with_config(command)


if __name__ == "__main__":
    main()

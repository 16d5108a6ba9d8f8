"""Many hosts as one: the processes of a cluster find each other before JAX starts."""

import os

import jax


def join_hosts() -> None:
    """Connects this process to the others of its job; alone, it does nothing.

    Slurm (`srun`) and TPU pods are known to JAX. Elsewhere every process is given
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. To be called before anything touches a device.
    """
    env = os.environ
    if "JAX_NUM_PROCESSES" in env:
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"],
            int(env["JAX_NUM_PROCESSES"]),
            int(env["JAX_PROCESS_ID"]),
        )
        return
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    workers = env.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if tasks > 1 or len(workers) > 1:
        jax.distributed.initialize()

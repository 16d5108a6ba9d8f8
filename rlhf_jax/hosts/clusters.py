"""What the environment of a process says of its job, on the clusters we know.

Slurm (`srun`), TPUs on GKE or on TPU VMs, Open MPI, and the pods of JobSets and indexed
Jobs say who is who. Elsewhere, or for what these do not say, every process is given

    JAX_COORDINATOR_ADDRESS    host:port of process 0
    JAX_NUM_PROCESSES          how many processes there are
    JAX_PROCESS_ID             which of them this is, from 0

and these come first. JAX_COORDINATOR_PORT changes the port of an address that is found.
JAX finds most of this itself, but says it to nobody before it waits for the others.
"""

import importlib.util
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rlhf_jax.errors import UserError

GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT = 8482  # the one that JAX takes on TPUs
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"

Env = Mapping[str, str]


class Job(NamedTuple):
    """The processes that compute as one, and which of them this is."""

    address: str  # host:port of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # GPUs of this process; None: all it sees


def find_job(env: Env) -> Job | None:
    """The job that an environment tells of; None for a process that is alone.

    Raises:
      UserError: it tells only a part, or what cannot be.
    """
    found = _of_slurm(env) or _of_tpus(env) or _of_open_mpi(env) or _of_pods(env)
    found |= {name: env[name] for name in GIVEN if env.get(name)}
    if not found:
        return None
    missing = [name for name in GIVEN if name not in found]
    if missing:
        raise UserError(
            f"there is {_words(name for name in GIVEN if name in found)} but no "
            f"{_words(missing)} in the environment: give every process all of "
            f"{_words(GIVEN)}, or none to run alone"
        )
    processes = whole_number(found, "JAX_NUM_PROCESSES", least=1)
    process = whole_number(found, "JAX_PROCESS_ID", least=0)
    if process >= processes:
        raise UserError(
            f"JAX_PROCESS_ID={process} must be below JAX_NUM_PROCESSES={processes}: "
            "processes are numbered from 0"
        )
    address = found["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port of process 0, "
            "as node1:1234"
        )
    return Job(address, processes, process, _gpus(env))


def whole_number(env: Env, name: str, *, least: int, default: int | None = None) -> int:
    """A variable's number; a `UserError` if it is none or below `least`."""
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text!r} must be a whole number of at least {least}")
    return int(text)


def _of_slurm(env: Env) -> dict[str, str]:
    """Of a task of `srun`."""
    tasks = whole_number(env, "SLURM_STEP_NUM_TASKS", default=1, least=1)
    if tasks == 1:
        return {}
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    missing = [name for name in needed if not env.get(name)]
    if missing:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={tasks} but there is no {_words(missing)}: start "
            "the processes with srun"
        )
    # "node[007-010,12],other" begins with node007
    nodes = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", env["SLURM_STEP_NODELIST"])
    # Two jobs seldom take the same of the last 4096 ports.
    port = 2**16 - 2**12 + whole_number(env, "SLURM_JOB_ID", least=0) % 2**12
    return _entry(nodes.split(",")[0], env, port, tasks, env["SLURM_PROCID"])


def _gpus(env: Env) -> tuple[int, ...] | None:
    """Tasks of Slurm or MPI that share a node and see all of its GPUs take one each."""
    if whole_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1, least=1) > 1:
        return (whole_number(env, "OMPI_COMM_WORLD_LOCAL_RANK", least=0),)
    tasks = whole_number(env, "SLURM_STEP_NUM_TASKS", default=1, least=1)
    nodes = whole_number(env, "SLURM_STEP_NUM_NODES", default=tasks, least=1)
    seen = env.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    if tasks <= nodes or len(seen) < 2 or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    return (whole_number(env, "SLURM_LOCALID", least=0),)


def _of_tpus(env: Env) -> dict[str, str]:
    """Of a host of a TPU slice or of several."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu"):
        return {}
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if not any(env.get(name) for name in names):
        env = {**env, **_metadata(env)}
    hosts = next((env[name].split(",") for name in names if env.get(name)), [])
    slices = whole_number(env, "MEGASCALE_NUM_SLICES", default=1, least=1)
    if len(hosts) * slices < 2:
        return {}
    process = whole_number(env, "TPU_WORKER_ID", least=0)
    process += len(hosts) * whole_number(env, "MEGASCALE_SLICE_ID", default=0, least=0)
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    return _entry(first.split(":")[0], env, PORT, len(hosts) * slices, process)


def _metadata(env: Env) -> dict[str, str]:
    """For a TPU VM, what GKE would have put into the environment.

    JAX sets TPU_SKIP_MDS_QUERY on import where there is no TPU.
    """
    if "TPU_SKIP_MDS_QUERY" in env or not importlib.util.find_spec("libtpu"):
        return {}
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")

    def ask(key: str) -> str:
        request = urllib.request.Request(METADATA.format(server, key))
        request.add_header("Metadata-Flavor", "Google")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    try:
        ends = ask("worker-network-endpoints").split(",")  # a host, or name:id:host
        worker = ask("agent-worker-number")
        settings = re.findall(r"^(MEGASCALE_\w+): *'?(.*?)'?$", ask("tpu-env"), re.M)
    except urllib.error.URLError:
        return {}
    hosts = ",".join(end.split(":")[-1] for end in ends)
    named = {"TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": worker}
    return {**named, **dict(settings)}


def _of_open_mpi(env: Env) -> dict[str, str]:
    """Of a process of `mpirun`, which does not say where process 0 is."""
    count = whole_number(env, "OMPI_COMM_WORLD_SIZE", default=1, least=1)
    if count == 1:
        return {}
    number = whole_number(env, "OMPI_COMM_WORLD_RANK", least=0)
    return dict(zip(GIVEN[1:], (str(count), str(number)), strict=True))


def _of_pods(env: Env) -> dict[str, str]:
    """Of a pod of an indexed Job, which is told how many there are.

    In a JobSet the address follows from the names, which its file has to put into
    JOBSET_NAME and REPLICATED_JOB_NAME.
    """
    count, number = env.get("JAX_NUM_PROCESSES"), env.get("JOB_COMPLETION_INDEX")
    if not count or not number:
        return {}
    name, group = env.get("JOBSET_NAME"), env.get("REPLICATED_JOB_NAME")
    if name and group:
        return _entry(f"{name}-{group}-0-0.{name}", env, PORT, count, number)
    return {"JAX_PROCESS_ID": number}


def _entry(
    host: str, env: Env, port: int, count: int | str, number: int | str
) -> dict[str, str]:
    port = whole_number(env, "JAX_COORDINATOR_PORT", default=port, least=1)
    return dict(zip(GIVEN, (f"{host}:{port}", str(count), str(number)), strict=True))


def _words(names: Iterable[str]) -> str:
    return ", ".join(names)

"""Processes of one job on this machine, each told who it is by its environment."""

import pathlib
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    status: int
    out: str
    err: str


def spoken(text: str) -> list[str]:
    """The lines that are not Gloo's, whose threads write into each other's."""
    of_gloo = lambda line: "[Gloo]" in line or "peer ranks" in line
    return [line for line in text.splitlines() if line and not of_gloo(line)]


def free_address() -> str:
    """localhost, and a port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def given(count: int) -> list[dict[str, str]]:
    """The environments of processes that are told by hand."""
    shared = {
        "JAX_COORDINATOR_ADDRESS": free_address(),
        "JAX_NUM_PROCESSES": str(count),
    }
    return [shared | {"JAX_PROCESS_ID": str(number)} for number in range(count)]


def start(
    command: Sequence[str], env: Mapping[str, str], each: Sequence[Mapping[str, str]]
) -> list[subprocess.Popen]:
    """Starts the same command once for every environment of `each`."""
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**env, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in each
    ]


def wait(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[Ended]:
    """Waits for all of them; what still runs at the end of the time is killed."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
            process.communicate()
        raise
    return [Ended(p.returncode, *texts) for p, texts in zip(processes, said)]


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    each: Sequence[Mapping[str, str]],
    timeout: float = 300,
) -> list[Ended]:
    """Runs the same command once for every environment, all at once, to the end."""
    return wait(start(command, env, each), timeout)

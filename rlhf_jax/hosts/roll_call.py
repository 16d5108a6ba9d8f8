"""Who of a job has come, asked before JAX connects them.

JAX itself would end a process from C++ when its time is over, and not say who is
missing. Process 0 waits at the port that JAX takes afterwards, every other process
writes its number there, and all get one answer: go on, or what is wrong.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Collection, Mapping

from rlhf_jax.errors import UserError
from rlhf_jax.hosts.clusters import Job

BETWEEN_LINES = 10.0  # seconds
SETTLED = 0.3  # seconds without a loss, once all are there
LISTED = 8  # absent processes that are named

Say = Callable[[str], None]


def call_roll(job: Job, timeout: float, say: Say) -> None:
    """Waits until all processes of a job are there.

    Args:
      job: who is who.
      timeout: seconds that process 0 waits for the others, and they for process 0.
      say: gets a line every ten seconds.

    Raises:
      UserError: on every process that is there: who did not come, or whose numbers do
        not fit together.
    """
    if job.process > 0:
        _report(job, timeout, say)
        return
    with contextlib.ExitStack() as connections:
        peers: list[socket.socket] = []
        with _listen(job) as server:
            problem = _gather(job, timeout, say, server, peers, connections)
        for peer in peers:
            with contextlib.suppress(OSError):
                _send(peer, {"problem": problem})
        for peer in peers:  # who closes first keeps the port busy
            _receive(peer, 1.0)
    if problem:
        raise UserError(problem)


def _gather(
    job: Job,
    timeout: float,
    say: Say,
    server: socket.socket,
    peers: list[socket.socket],
    connections: contextlib.ExitStack,
) -> str:
    """Takes the others' numbers; what is wrong in the end, or nothing."""
    there: dict[int, socket.socket] = {}
    clock = _Clock(timeout)
    while True:
        there = {number: peer for number, peer in there.items() if not _ended(peer)}
        if len(there) == job.processes - 1:
            # One that died right after it spoke is still on its way out.
            if not select.select(list(there.values()), [], [], SETTLED)[0]:
                return ""
            continue
        absent = _processes(set(range(1, job.processes)) - there.keys())
        if clock.over():
            return (
                f"process 0 of {job.processes} waited {timeout:.0f} s at {job.address} "
                f"and {absent} did not come: look whether all were started, into their "
                "logs, and whether they can reach that address; "
                "JAX_COORDINATOR_TIMEOUT sets the seconds"
            )
        if clock.line_is_due():
            who = f"process 0 of {job.processes} at {job.address}"
            say(f"{who} waits for {absent}, {clock}")
        if not select.select([server], [], [], 0.5)[0]:
            continue
        peer = connections.enter_context(server.accept()[0])
        hello = _receive(peer, 5.0)
        if not hello or not {"process", "processes"} <= hello.keys():
            continue  # something that looks for open ports
        peers.append(peer)
        problem = _misfit(job, hello, there)
        if problem:
            return problem
        there[hello["process"]] = peer


def _misfit(job: Job, hello: Mapping, there: Mapping[int, socket.socket]) -> str:
    """What is wrong with the numbers of one that comes, or nothing.

    One that comes a second time has been started again, if the first is gone.
    """
    process, processes = hello["process"], hello["processes"]
    if processes != job.processes:
        return (
            f"process 0 was told of {job.processes} processes and process {process} of "
            f"{processes}: give all of them the same JAX_NUM_PROCESSES"
        )
    if process in there and not _ended(there[process]):
        return (
            f"two processes say that they are number {process} of {processes}: give "
            "each a JAX_PROCESS_ID of its own"
        )
    return ""


def _report(job: Job, timeout: float, say: Say) -> None:
    """Tells process 0 that this one is there, and waits for its answer."""
    who = f"process {job.process} of {job.processes}"
    clock = _Clock(timeout)
    while True:
        answer = _ask(job, timeout)
        if isinstance(answer, dict):
            if answer["problem"]:
                raise UserError(answer["problem"])
            return
        if clock.over():
            raise UserError(
                f"{who} waited {timeout:.0f} s for process 0 at {job.address} in vain "
                f"({answer}): look whether it was started, into its log, whether the "
                "address is right and the port open; JAX_COORDINATOR_TIMEOUT sets the "
                "seconds"
            )
        if clock.line_is_due():
            say(f"{who} waits for process 0 at {job.address} ({answer}), {clock}")
        time.sleep(0.5)


def _ask(job: Job, timeout: float) -> dict | str:
    """The answer of process 0, or why there is none."""
    host, _, port = job.address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 5.0) as first:
            _send(first, {"process": job.process, "processes": job.processes})
            # Process 0 waits as long, and may have begun later.
            answer = _receive(first, timeout + 30)
    except OSError as error:
        return error.strerror or str(error)
    known = answer is not None and "problem" in answer
    return answer if known else "what is there gave no answer"


def _listen(job: Job) -> socket.socket:
    place = ("", int(job.address.rpartition(":")[2]))
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                place, family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(place)
    except OSError as error:
        raise UserError(
            f"process 0 cannot wait for the others at {job.address} "
            f"({error.strerror}): give all of them another port, with "
            "JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT"
        ) from error


def _send(peer: socket.socket, message: Mapping) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket, seconds: float) -> dict | None:
    """The line that the other end sends, or None if it sends none."""
    peer.settimeout(seconds)
    try:
        with peer.makefile("rb") as file:
            message = json.loads(file.readline(4096))
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _ended(peer: socket.socket) -> bool:
    """Whether the other end of a connection is gone: it says nothing but its name."""
    return bool(select.select([peer], [], [], 0)[0])


def _processes(numbers: Collection[int]) -> str:
    listed = ", ".join(map(str, sorted(numbers)[:LISTED]))
    more = f" and {len(numbers) - LISTED} more" if len(numbers) > LISTED else ""
    return f"process{'es' if len(numbers) > 1 else ''} {listed}{more}"


class _Clock:
    """How long one has waited, and whether it is time to say so."""

    def __init__(self, timeout: float):
        self._timeout, self._started = timeout, time.monotonic()
        self._told = self._started

    def over(self) -> bool:
        return time.monotonic() - self._started > self._timeout

    def line_is_due(self) -> bool:
        due = time.monotonic() - self._told > BETWEEN_LINES
        if due:
            self._told = time.monotonic()
        return due

    def __str__(self) -> str:
        return f"{time.monotonic() - self._started:.0f} of {self._timeout:.0f} s"

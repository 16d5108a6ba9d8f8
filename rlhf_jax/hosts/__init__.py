"""Many hosts as one: the processes of a job find each other before JAX starts.

Where they are is read from the environment, see `clusters`. Beside that it may hold
JAX_COORDINATOR_TIMEOUT, the seconds in which all have to come, and
JAX_HEARTBEAT_TIMEOUT, the seconds after which a silent process is taken for dead.
"""

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError
from rlhf_jax.hosts.clusters import find_job, whole_number
from rlhf_jax.hosts.roll_call import call_roll

TIMEOUT = 300  # seconds
HEARTBEAT = 100  # seconds, as in JAX
GRACE = 3.0  # seconds that process 0 leaves the others to end first
LEAST_MESSAGE = 1024  # bytes; longer ones are filled up to a power of two


def join_hosts() -> None:
    """Connects this process to the others of its job; alone, it does nothing.

    To be called before anything touches a device.

    Raises:
      UserError: the environment says where the others are only in part or wrongly, or
        some of them did not come in time.
    """
    env = os.environ
    job = find_job(env)
    if job is None:
        return
    timeout = whole_number(env, "JAX_COORDINATOR_TIMEOUT", default=TIMEOUT, least=1)
    heartbeat = whole_number(env, "JAX_HEARTBEAT_TIMEOUT", default=HEARTBEAT, least=1)
    if job.processes > 1:
        call_roll(job, timeout, lambda text: print(text, file=sys.stderr, flush=True))
    jax.distributed.initialize(
        *(job.address, job.processes, job.process, job.devices),
        cluster_detection_method="deactivate",  # all of it is known
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=heartbeat,
    )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the hosts for some work; if it fails on one, the others end soon too.

    JAX's way out waits for all processes, which wait for what the failed one does not
    send any more: five minutes pass before they give up.
    """
    join_hosts()
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            # Called before JAX's own, as the last that was registered, and after
            # whoever catches the error has said what it is.
            atexit.register(_leave, _status(error))
            if isinstance(error, Exception) and not isinstance(error, UserError):
                error.add_note(
                    f"This is process {jax.process_index()} of {jax.process_count()}: "
                    "if a connection was closed, another one ended before, and its "
                    "output says why."
                )
        raise


def exchange(message: bytes) -> list[bytes]:
    """The messages of all processes, in their order, on every one of them."""
    if jax.process_count() == 1:
        return [message]
    sizes = multihost_utils.process_allgather(np.int32(len(message)))
    # Few lengths, as each is a program of its own.
    width = max(LEAST_MESSAGE, 1 << (int(sizes.max()) - 1).bit_length())
    padded = np.zeros(width, np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _status(error: BaseException) -> int:
    """The exit status that an exception stands for, see `command_line`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError) else 1


def _leave(status: int) -> None:
    """Ends the process without JAX's farewell."""
    if jax.process_index() == 0:
        time.sleep(GRACE)  # they end with process 0, before they have said why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

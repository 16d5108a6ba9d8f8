"""Several processes as one job: they meet, talk, and end together."""

import os
import signal
import sys
import time

import pytest

from rlhf_jax import hosts
from tests import processes

JOINED = """
import os, sys, time
from rlhf_jax import hosts
from rlhf_jax.command_line import run_command
from rlhf_jax.errors import UserError

def command():
    with hosts.joined():
        import jax
        number = jax.process_index()
        {work}

run_command(command)
"""
EXCHANGE = """
        for length in (0, 10, 5000):
            message = bytes([number]) * (length + number)
            for i, part in enumerate(hosts.exchange(message)):
                assert part == bytes([i]) * (length + i), (number, length, i, part)
        print("agreed on", number)
"""
FAILS = """
        hosts.exchange(b"here")
        if number == {who}:
            raise UserError("the disk is full")
        hosts.exchange(b"still here")
"""
WAITS = """
        while True:
            hosts.exchange(b"here")
            print("went on", flush=True)
            time.sleep(0.1)
"""


@pytest.fixture
def one_device():
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }


def program(work):
    return [sys.executable, "-c", JOINED.format(work=work.strip())]


def until_it_went_on(process):
    while "went on" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


def test_alone_there_is_nothing_to_exchange():
    assert hosts.exchange(b"mine") == [b"mine"]


def test_messages_of_any_length(one_device):
    ended = processes.run(program(EXCHANGE), one_device, processes.given(3))
    for number, process in enumerate(ended):
        assert process.status == 0, process.err
        assert f"agreed on {number}" in process.out


def test_a_peer_that_does_not_come(one_device):
    """A sentence, the status of mistakes, and not a second after the time is over."""
    env = one_device | {"JAX_COORDINATOR_TIMEOUT": "2"}
    started = time.monotonic()
    (ended,) = processes.run(program("pass"), env, processes.given(2)[:1])
    assert time.monotonic() - started < 30
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: process 0 of 2 waited 2 s at 127.0.0.1:")
    assert "process 1 did not come" in line


def test_a_time_that_is_no_number(one_device):
    env = one_device | {"JAX_COORDINATOR_TIMEOUT": "soon"}
    (ended,) = processes.run(program("pass"), env, processes.given(2)[:1])
    assert ended.status == 2
    assert ended.err.startswith("error: JAX_COORDINATOR_TIMEOUT='soon' must be a whole")


@pytest.mark.parametrize("who", [0, 1])
def test_if_one_fails_the_others_end(one_device, who):
    """JAX's own farewell would take five minutes."""
    started = time.monotonic()
    work = FAILS.format(who=who)
    ended = processes.run(program(work), one_device, processes.given(2))
    assert time.monotonic() - started < 60
    assert ended[who].status == 2
    assert ended[who].err.splitlines()[-1] == "error: the disk is full"
    assert ended[1 - who].status not in (0, 2)
    told = ended[1 - who].err
    # from Python, or from JAX where process 0 is gone
    assert "another one ended before" in told or "another task died" in told


def test_if_one_is_killed_the_others_end(one_device):
    env = one_device | {"JAX_HEARTBEAT_TIMEOUT": "10"}
    started = processes.start(program(WAITS), env, processes.given(3))
    until_it_went_on(started[0])
    started[1].send_signal(signal.SIGKILL)
    since = time.monotonic()
    ended = processes.wait(started)
    assert time.monotonic() - since < 60
    assert ended[1].status == -signal.SIGKILL
    for other in (ended[0], ended[2]):
        assert other.status not in (0, -signal.SIGKILL)
        assert other.err


def test_if_one_is_silent_the_others_end(one_device):
    """As when its network is gone: nothing says that it is."""
    env = one_device | {"JAX_HEARTBEAT_TIMEOUT": "10"}
    started = processes.start(program(WAITS), env, processes.given(2))
    until_it_went_on(started[0])
    started[1].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    try:
        (ended,) = processes.wait(started[:1])
    finally:
        started[1].kill()
        started[1].communicate()
    assert time.monotonic() - since < 60
    assert ended.status != 0
    assert "another task died" in ended.err

"""Who has come: processes played by threads, and what each is told."""

import concurrent.futures
import socket
import time

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import roll_call
from rlhf_jax.hosts.clusters import Job
from rlhf_jax.hosts.roll_call import call_roll


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def call(jobs, *, timeout=1.0, delays=(), said=None):
    """What each is told in the end: None, or the sentence."""

    def one(job, delay):
        time.sleep(delay)
        try:
            call_roll(job, timeout, (said if said is not None else []).append)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        delays = [*delays, *[0.0] * len(jobs)][: len(jobs)]
        return list(pool.map(one, jobs, delays))


@pytest.mark.parametrize("delays", [(), (1.2,), (0, 1.2)])
def test_all_come(address, delays):
    """Process 0 first or last; and its port is free afterwards."""
    jobs = [Job(address, 3, number) for number in range(3)]
    assert call(jobs, timeout=20, delays=delays) == [None] * 3
    assert call(jobs, timeout=20) == [None] * 3


def test_some_do_not_come(address):
    there = [Job(address, 4, number) for number in (0, 2)]
    said, started = [], time.monotonic()
    first, second = call(there, timeout=1.0, said=said)
    assert time.monotonic() - started < 5
    assert first == second
    assert f"process 0 of 4 waited 1 s at {address} and processes 1, 3 did not" in first
    assert "JAX_COORDINATOR_TIMEOUT" in first
    assert said == []  # that was too quick for a line


def test_process_0_does_not_come(address):
    (told,) = call([Job(address, 2, 1)], timeout=0.6)
    assert f"process 1 of 2 waited 1 s for process 0 at {address} in vain" in told
    assert "refused" in told


def test_a_name_that_does_not_resolve():
    (told,) = call([Job("no-such-host.invalid:80", 2, 1)], timeout=0.6)
    assert "process 0 at no-such-host.invalid:80 in vain (" in told


def test_lines_while_one_waits(address, monkeypatch):
    monkeypatch.setattr(roll_call, "BETWEEN_LINES", 0.2)
    said = []
    call([Job(address, 12, 0)], timeout=1.5, said=said)
    assert "waits for processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more, 1 of 2 s" in said[-1]
    call([Job(address, 2, 1)], timeout=1.5, said=said)
    assert f"process 1 of 2 waits for process 0 at {address} (" in said[-1]


def test_two_with_one_number(address):
    told = call([Job(address, 3, number) for number in (0, 1, 1)], timeout=20)
    assert len(set(told)) == 1
    assert "two processes say that they are number 1 of 3" in told[0]


def test_another_count(address):
    told = call([Job(address, 3, 0), Job(address, 4, 1)], timeout=20)
    assert told[0] == told[1]
    assert "told of 3 processes and process 1 of 4" in told[0]


def test_strangers_and_a_process_that_starts_again(address):
    """Something that looks for open ports, and a process 1 that died and came back."""
    host, port = address.split(":")

    def knock(message):
        with socket.create_connection((host, int(port)), 5) as stranger:
            stranger.sendall(message)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(call_roll, Job(address, 3, 0), 20, print)
        second = pool.submit(call_roll, Job(address, 3, 2), 20, print)
        time.sleep(0.7)
        for message in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": 1}\n'):
            knock(message)
        knock(b'{"process": 1, "processes": 3}\n')
        time.sleep(0.7)
        assert not first.done()
        third = pool.submit(call_roll, Job(address, 3, 1), 20, print)
        for each in (first, second, third):
            assert each.result(20) is None


def test_a_port_that_is_taken(address):
    port = int(address.split(":")[1])
    with socket.create_server(("", port)):
        (told,) = call([Job(address, 2, 0)])
    assert f"process 0 cannot wait for the others at {address} (" in told
    assert "JAX_COORDINATOR_PORT" in told

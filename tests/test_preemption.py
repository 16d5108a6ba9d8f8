"""Signals that ask a run to end: once, twice, and when the time is over."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax import preemption

ROOT = pathlib.Path(__file__).parents[1]


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.fixture
def said():
    return []


@pytest.fixture
def stop(said):
    with preemption.listen(60.0, said.append) as stop:
        yield stop


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_the_first_signal_only_asks(stop, said, signum, status):
    assert not stop.asked(1)
    with stop.may_drop():
        send(signum)
    assert stop.asked(2) and stop.asked(3)
    assert signal.Signals(signum).name in said[0]
    with pytest.raises(SystemExit) as end:
        raise preemption.Stopped(stop.signum)
    assert end.value.code == status


def test_a_second_sigterm_drops_the_phase(stop):
    send(signal.SIGTERM)
    send(signal.SIGTERM)  # between phases there is nothing to drop
    with pytest.raises(preemption.Dropped), stop.may_drop():
        send(signal.SIGTERM)
    send(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_is_immediate(stop, first):
    send(first)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_half_of_the_grace_drops_the_phase():
    with preemption.listen(0.4, print) as stop:
        began = time.monotonic()
        send(signal.SIGTERM)
        with pytest.raises(preemption.Dropped), stop.may_drop():
            time.sleep(20)
        assert 0.1 < time.monotonic() - began < 10


def test_signals_are_given_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with preemption.listen(60.0, print):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


DEAF = """
import os, signal, threading
from rlhf_jax import preemption
with preemption.listen(0.2, print):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Event().wait()  # as in one long computation
"""


BUSY = """
import hashlib, os, signal, threading
from rlhf_jax import preemption
with preemption.listen(0.2, print):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # no handler runs meanwhile
"""


@pytest.mark.parametrize("program", [DEAF, BUSY])
def test_the_end_of_the_grace_is_the_end(program):
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 143, ended.stderr
    assert "0.2 s of config.grace_s are over" in ended.stdout

"""A run that is asked to end: by a scheduler (SIGTERM) or by hand (Ctrl-C).

The phase in flight is finished and saved, and the process ends with 128 plus the
signal's number: 143 after SIGTERM, 130 after Ctrl-C. The same command then goes on as
if nothing had been.

A scheduler kills what is still there after a while (Slurm's KillWait and Kubernetes'
terminationGracePeriodSeconds are 30 s if nobody set them). So after half of the grace,
or at a second SIGTERM, the phase in flight is dropped: what was before it is saved if
it still exists, as it does until the update has begun. At the end of the grace the
process ends with what was saved before. A second Ctrl-C ends it at once.

With several processes all have to stop after the same phase. JAX's coordinator agrees
on it, whichever of them got the signal, and the phase in flight is always finished.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(SystemExit):
    """The run ended because it was asked to, and can go on."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class Dropped(BaseException):
    """The phase in flight is given up: no `Exception`, so that nothing swallows it."""


class Stop:
    """What was asked of the run; from `listen`.

    Attributes:
      signum: the signal that asked it to end, or None.
    """

    def __init__(self, grace: float, say: Callable[[str], None]):
        self.signum: int | None = None
        self._grace, self._say = grace, say
        self._droppable = False
        self._timers: list[threading.Timer] = []
        self._lock, self._closed = threading.Lock(), False

    def asked(self, phase: int) -> bool:
        """Whether to end before this phase; the same in every process.

        Every process asks it of every phase, in order.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            phase
        ):
            self.signum = signal.SIGTERM
        return self.signum is not None

    @contextlib.contextmanager
    def may_drop(self) -> Iterator[None]:
        """While it is open, a stop that is out of time raises `Dropped`."""
        self._droppable = True
        try:
            yield
        finally:
            self._droppable = False

    def on_signal(self, signum: int, _frame: object) -> None:
        """Notes the first signal; a second one has no patience."""
        if self.signum is None:
            self.signum = signum
            name = signal.Signals(signum).name
            if signum == signal.SIGINT:
                tell = "the phase in flight is finished and saved; Ctrl-C again stops"
                self._tell(f"{name}: {tell} at once")
                return
            self._tell(f"{name}: the phase in flight is finished, if time is left")
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        elif self._droppable:
            self._droppable = False
            raise Dropped

    def begin_grace(self) -> None:
        """Starts the clock, once; called by the thread of `_watch_for_sigterm`."""
        with self._lock:
            if not self._timers and not self._closed:
                self._start(self._grace / 2, _signal_again)
                self._start(self._grace, self._end)

    def close(self) -> None:
        """Ends what was to happen at the end of the grace."""
        with self._lock:
            self._closed = True
            for timer in self._timers:
                timer.cancel()

    def _start(self, seconds: float, act: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, act)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _end(self) -> None:
        """The last resort, of a thread: the program may be deep in one computation."""
        self._tell(
            f"the {self._grace:g} s of config.grace_s are over; the same command goes "
            "on from the last checkpoint"
        )
        sys.stdout.flush()
        os._exit(128 + signal.SIGTERM)

    def _tell(self, text: str) -> None:
        # In the middle of a print of its own the console may not be entered again.
        with contextlib.suppress(RuntimeError):
            self._say(text)


@contextlib.contextmanager
def listen(grace: float, say: Callable[[str], None]) -> Iterator[Stop]:
    """Takes over SIGTERM and SIGINT, and gives them back in the end.

    Args:
      grace: seconds from SIGTERM to the end of the process.
      say: gets a sentence.
    """
    stop = Stop(grace, say)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread gets signals
        return
    # Of several processes JAX listens to SIGTERM, and Ctrl-C is immediate.
    if jax.process_count() > 1:
        yield stop
        return
    taken = (signal.SIGTERM, signal.SIGINT)
    before = {signum: signal.signal(signum, stop.on_signal) for signum in taken}
    try:
        with _watch_for_sigterm(stop.begin_grace):
            yield stop
    finally:
        stop.close()
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _watch_for_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in a thread of its own as soon as SIGTERM comes.

    Python's handlers wait until the main thread is back from a computation, which may
    take longer than the grace.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reads, 1):
            if number[0] == signal.SIGTERM:
                act()
        os.close(reads)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writes)  # which ends the thread


def _signal_again() -> None:
    os.kill(os.getpid(), signal.SIGTERM)

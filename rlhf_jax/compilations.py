"""How many programs XLA compiled, and how long that took."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# As JAX 0.10 and 0.11 call them; a program from JAX's persistent cache is told twice,
# by both events.
COMPILED = "/jax/core/compile/backend_compile_duration"
CACHED = "/jax/compilation_cache/cache_hits"


class Compilations(NamedTuple):
    """What was compiled since `watch`.

    Attributes:
      programs: how many, those read from JAX's persistent cache too.
      cached: how many of them were read from there.
      seconds: of all, in this process.
    """

    programs: int
    cached: int
    seconds: float

    def __str__(self) -> str:
        read = f", {self.cached} of them from the cache" if self.cached else ""
        plural = "" if self.programs == 1 else "s"
        return f"{self.programs} program{plural} compiled in {self.seconds:.1f} s{read}"


class Watching(NamedTuple):
    """A count that goes on until it is closed."""

    report: Callable[[], Compilations]
    close: Callable[[], None]


def watch() -> Watching:
    """Begins to count; what was compiled before is not in it."""
    seconds: list[float] = []
    hits: list[None] = []

    # Lists, for several threads may compile at once.
    def on_duration(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            seconds.append(duration)

    def on_event(event: str, **_: Any) -> None:
        if event == CACHED:
            hits.append(None)

    def report() -> Compilations:
        return Compilations(len(seconds), len(hits), sum(seconds))

    def close() -> None:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    return Watching(report, close)

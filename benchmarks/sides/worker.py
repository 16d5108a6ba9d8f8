"""The loop of a worker: builds one case, then runs it whenever it is told to.

A worker knows neither the other side nor the rounds. It reads one word a line, "first",
"run" or "outputs", and answers with one line of JSON. Outputs are compared before
anything is timed, and their arrays go by a file.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """One side of one comparison.

    Attributes:
      run: does the work once and waits for its end; round number -> units of work (for
        example tokens), or None for the same number as always.
      outputs: what both sides must agree in, by name; called once, after the first run.
    """

    run: Callable[[int], float | None]
    outputs: Callable[[], Mapping[str, Any]]


def peak_bytes() -> int:
    """The most memory that this process had, VmHWM."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def serve(builders: Mapping[str, Callable[[str], Case]]) -> None:
    """Serves the case of the command line, `<case> <folder>`, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    name, folder = sys.argv[1:]
    number = 0

    def answer(**told):
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    started = time.perf_counter()
    case = builders[name](folder)
    answer(build=time.perf_counter() - started)
    for line in sys.stdin:
        if line.strip() == "outputs":
            path = pathlib.Path(folder) / f"outputs_{os.getpid()}.npz"
            np.savez(path, **{k: np.asarray(v) for k, v in case.outputs().items()})
            answer(path=str(path))
            continue
        started, busy = time.perf_counter(), time.process_time()
        units = case.run(number)
        told = {"cpu": time.process_time() - busy}
        told["seconds"] = time.perf_counter() - started
        number += 1
        answer(**told, units=units, peak=peak_bytes())

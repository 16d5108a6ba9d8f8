"""Speed and memory against transformers, TRL and torch, on one pinned core.

    python benchmarks/peers.py --torch=/path/to/venv/bin/python [--only=generate,dpo]

The other Python needs torch, transformers and trl. Both sides run in processes of their
own on the same core, with the same weights and tokens; what they compute is compared
first, then they run by turns. Each row has the median of the rounds' ratios, theirs
over ours: above 1 we are faster. See README.md for the cases.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

SIDES = pathlib.Path(__file__).parent / "sides"
sys.path.insert(0, str(SIDES))

from rows import ROWS, Row  # noqa: E402


class Measured(NamedTuple):
    """One side's figures of one case."""

    seconds: list[float]  # of each round
    cpu: list[float]  # seconds of the processor in each round
    units: list[float]  # work done in each, in the row's unit
    first: float  # processor seconds of the first call, compilation included
    peak: int  # bytes, the most memory the process had

    def rates(self, seconds: list[float]) -> np.ndarray:
        """Units a second of each round."""
        return np.array(self.units) / np.array(seconds)


class Worker:
    """A process that runs one case of one side when it is told to."""

    def __init__(self, python: str, script: str, case: str, folder: str, core: int):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "0",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - of the process
        self._process = subprocess.Popen(
            ["taskset", "-c", str(core), python, SIDES / script, case, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.build_seconds = self._answer()["build"]

    def ask(self, word: str) -> dict:
        """Sends one word and waits for the answer."""
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError("a worker ended:\n" + self._log.read()[-2000:])
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def compare(row: Row, ours: Worker, theirs: Worker) -> list[str]:
    """What both sides computed, by name: whether it is the same, in words."""
    pair = [np.load(worker.ask("outputs")["path"]) for worker in (ours, theirs)]
    notes = []
    for name in pair[0].files:
        one, other = (np.asarray(outputs[name]) for outputs in pair)
        if one.shape != other.shape:
            raise RuntimeError(f"{row.case}, {name}: shapes {one.shape}, {other.shape}")
        if one.dtype.kind in "iu":
            difference = float((one != other).mean())
            notes.append(f"{name}: {1 - difference:.2%} of the tokens equal")
        else:
            scale = max(float(np.linalg.norm(other)), 1e-30)
            difference = float(np.linalg.norm(one - other)) / scale
            notes.append(f"{name} within {difference:.1e}")
        if difference > row.tolerance.get(name, 1e-3):
            notes.append(f"DIFFERENT: {name}")
    return notes


def measure(row: Row, arguments, folder: str) -> tuple[Measured, Measured, list[str]]:
    """Starts both sides, compares what they compute, and times them by turns."""
    makers = ((sys.executable, "ours.py"), (arguments.torch, "theirs.py"))
    workers = [
        Worker(python, script, row.case, folder, arguments.core)
        for python, script in makers
    ]
    try:
        firsts = [worker.ask("first") for worker in workers]
        notes = compare(row, *workers) if row.compared else []
        for worker in workers * row.warm:
            worker.ask("run")
        rounds = [
            [worker.ask("run") for worker in workers]
            for _ in range(arguments.rounds or row.rounds)
        ]
    finally:
        for worker in workers:
            worker.close()
    measured = []
    for side, first in enumerate(firsts):
        told = [answers[side] for answers in rounds]
        seconds = [one["seconds"] for one in told]
        measured.append(
            Measured(
                seconds,
                [one["cpu"] for one in told],
                [one["units"] or row.units for one in told],
                first["cpu"],
                max(one["peak"] for one in told),
            )
        )
    return *measured, notes


def report(row: Row, ours: Measured, theirs: Measured) -> str:
    """One line of the table."""
    wall = ours.rates(ours.seconds) / theirs.rates(theirs.seconds)
    ratios = ours.rates(ours.cpu) / theirs.rates(theirs.cpu)
    speeds = [np.median(side.rates(side.cpu)) for side in (theirs, ours)]
    compiling = [
        max(side.first - statistics.median(side.cpu), 0.0) for side in (theirs, ours)
    ]
    flops = row.flops / statistics.median(ours.cpu) / 1e9
    digits = 2 if row.unit == "step" else 0
    columns = (
        row.title,
        f"{speeds[0]:,.{digits}f}",
        f"{speeds[1]:,.{digits}f} {row.unit}/s",
        f"**{np.median(ratios):.2f}** ({ratios.min():.2f} to {ratios.max():.2f})",
        f"{np.median(wall):.2f}",
        f"{row.goal:.1f}",
        f"{flops:.0f}" if flops else "-",
        f"{compiling[0]:.1f} / {compiling[1]:.1f}",
        f"{theirs.peak / 2**30:.2f} / {ours.peak / 2**30:.2f}",
    )
    return f"| {' | '.join(columns)} |"


HEADER = """\
| case | theirs | ours | ratio | by the clock | goal | GFLOP/s | compile s | peak GiB |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Run the rows that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", required=True, help="Python with torch and trl")
    parser.add_argument("--only", default="", help="cases, with commas between")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0, help="0: each row's own")
    parser.add_argument("--folder", default="", help="where the models are kept")
    arguments = parser.parse_args()
    asked = [name for name in arguments.only.split(",") if name]
    unknown = sorted(set(asked) - {row.case for row in ROWS})
    if unknown:
        sys.exit(
            f"--only has {', '.join(unknown)}: take from "
            + ", ".join(row.case for row in ROWS)
        )
    with tempfile.TemporaryDirectory() as spare:
        folder = arguments.folder or spare
        if not (pathlib.Path(folder) / "gpt2" / "config.json").exists():
            script = str(SIDES / "ours.py")
            subprocess.run([sys.executable, script, "export", folder], check=True)
        failed = []
        print(HEADER, flush=True)
        for row in ROWS:
            if asked and row.case not in asked:
                continue
            started = time.perf_counter()
            try:
                *sides, notes = measure(row, arguments, folder)
            except RuntimeError as error:
                print(f"{row.case}: {error}", file=sys.stderr)
                failed.append(row.case)
                continue
            failed += [row.case] * any("DIFFERENT" in note for note in notes)
            print(report(row, *sides), flush=True)
            seconds = time.perf_counter() - started
            told = "; ".join([row.case, *notes, f"{seconds:.0f} s"])
            print(told, file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"failed, or outputs differ: {', '.join(failed)}")


if __name__ == "__main__":
    main()

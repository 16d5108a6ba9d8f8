"""The same run on one device, on any mesh of eight, in two and in four processes.

    python benchmarks/everywhere.py

PPO, GRPO and DPO of the tests' tiny world in float32, each against one device in one
process: the largest difference of a loss and of any metric over two phases, how many
tokens of greedy answers before and after the training are the same, and whether all
responses that were drawn at temperature 0.7 are. Ends with 1 if a loss is off by more
than 1e-5, another metric by more than 1e-4, or a token differs. It takes half an hour
on two cores: the time is XLA's, of whose optimizations most are off.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TESTS = "tests/trainers/test_processes.py"
HEADER = (
    ("processes x devices, mesh data x fsdp x tensor", "algorithm", "largest loss"),
    ("largest metric", "greedy tokens", "drawn responses", "result"),
)


def machine() -> str:
    """The date, versions, and the machine in plain words."""
    names = ("jax", "jaxlib", "flax", "optax")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    cores = f"{os.cpu_count()} cores ({platform.machine()}), shared with other work"
    python = f"Python {platform.python_version()}"
    return f"{datetime.date.today()}, {', '.join(versions)}, {python}, {cores}"


def main() -> int:
    """Runs all cases, and prints a line for each as it ends."""
    print(machine() + "\n")
    columns = [name for line in HEADER for name in line]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:xdist", TESTS, "-rf"],
        cwd=ROOT,
        env=os.environ | {"EVERYWHERE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("| "):
            print(line, end="", flush=True)
    if process.wait():
        print("".join(said), file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())

"""Seconds until the first optimizer step of `configs/ppo.py`, cold and with a cache.

    taskset -c 0 python benchmarks/first_step.py [--config=configs/grpo.py]

Starts `python -m rlhf_jax.train` twice with the same empty folder for JAX's persistent
compilation cache, and waits for the first phase's row in metrics.jsonl. The held-out
evaluation before it is part of the time.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time


def first_step(config: str, workdir: str, cache: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor until the first phase is logged."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = time.perf_counter()
    command = [sys.executable, "-m", "rlhf_jax.train", f"--config={config}"]
    process = subprocess.Popen(
        [*command, f"--config.workdir={workdir}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not logged(pathlib.Path(workdir) / "metrics.jsonl"):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended before its first step")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        return seconds, busy_seconds(process.pid)
    finally:
        process.kill()
        process.wait()


def logged(metrics: pathlib.Path) -> bool:
    """Whether a phase's row is in the file."""
    if not metrics.exists():
        return False
    lines = metrics.read_text().split("\n")[:-1]
    return any(json.loads(line).get("phase", 0) >= 1 for line in lines)


def busy_seconds(pid: int) -> float:
    """What a process has used of the processor, its children left out."""
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Print both, cold first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/ppo.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "with the cache"):
            place = str(pathlib.Path(folder) / name)
            cache = str(pathlib.Path(folder) / "cache")
            clock, busy = first_step(arguments.config, place, cache)
            print(f"{name}: {clock:.1f} s, {busy:.1f} s of the processor", flush=True)


if __name__ == "__main__":
    main()

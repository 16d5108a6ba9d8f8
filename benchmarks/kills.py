"""Kills the default PPO run at random instants, and compares it with one left alone.

    python benchmarks/kills.py [--kills=50] [--phases=30] [--seed=0] [--keep=FOLDER]

A run of configs/ppo.py is made once without a disturbance. The same command then runs
in another folder and is ended by SIGKILL, again and again, and started again each time;
at last it runs to its end. A run that ends before all kills are made is followed by
another. Instants are uniform over three times the time to the first save, but for every
fifth, which is aimed into one of the first saves. Weights, optimizer, metrics but for
times, responses and samples have to be the same bit for bit, and each start has to go
on from the newest checkpoint that was whole at the kill. Exits with 1 if they are not.
"""

import argparse
import collections
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("start-up", "rollout", "update", "evaluation", "save", "export")
EVERY = ("checkpoint.every=1", "evaluate_every=3", "samples_every=5")


def run_marked(stage_file: str, flags: list[str]) -> None:
    """Trains as `rlhf_jax.train` does, and keeps in a file what it is doing."""
    from rlhf_jax import checkpoint, train, trainable
    from rlhf_jax.trainers import online

    file = os.open(stage_file, os.O_WRONLY)

    def mark(stage):
        os.pwrite(file, f"{stage:<12}".encode(), 0)

    def marked(function, stage, after):
        @functools.wraps(function)
        def run(*args, **kwargs):
            mark(stage)
            result = function(*args, **kwargs)
            mark(after)
            return result

        return run

    def maker(make, stage, after):
        return lambda *args, **kwargs: marked(make(*args, **kwargs), stage, after)

    online.make_collect = maker(online.make_collect, "rollout", "update")
    online.make_evaluation = maker(online.make_evaluation, "evaluation", "update")
    checkpoint.save = marked(checkpoint.save, "save", "update")
    trainable.export = marked(trainable.export, "export", "export")
    sys.argv = ["rlhf_jax.train", *flags]
    train.main()


class Life:
    """One process of the run, from its start to its end or its kill."""

    def __init__(self, workdir: pathlib.Path, phases: int, cache: pathlib.Path):
        self.workdir = workdir
        self._stage = workdir.with_name(workdir.name + ".stage")
        self._stage.write_text(f"{'start-up':<12}")
        self._log = workdir.with_name(workdir.name + ".log")
        settings = (f"workdir={workdir}", f"total_phases={phases}", *EVERY)
        flags = [f"--config.{setting}" for setting in settings]
        # What an earlier kill left half-saved goes as the run starts.
        self._left = set(half_saved(workdir))
        self.started = time.monotonic()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, __file__, "--marked", str(self._stage)),
                    *("--config=configs/ppo.py", *flags),
                ],
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": str(ROOT),
                    "JAX_COMPILATION_CACHE_DIR": str(cache),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> None:
        """Waits for its own end."""
        if self.process.wait() != 0:
            sys.exit(f"the run failed:\n{self._log.read_text()}")

    def kill(self) -> str | None:
        """Ends it by SIGKILL, and tells what it was doing; None if it was done."""
        if self.process.poll() is not None:
            return None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        stage = self._stage.read_text().strip()
        return "save" if self.saves() else stage

    def saves(self) -> bool:
        """Whether a checkpoint of its own is being written."""
        return bool(set(half_saved(self.workdir)) - self._left)

    def went_on_after(self) -> int | None:
        """The phase that it says it went on after."""
        found = re.search(r"going on after phase (\d+)", self._log.read_text())
        return int(found[1]) if found else None


def half_saved(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that are being written."""
    return list(workdir.glob("checkpoints/*tmp*"))


def newest(workdir: pathlib.Path) -> int | None:
    """The newest checkpoint that is whole."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def kill_in_save(life: Life, draw: random.Random) -> str | None:
    """Waits until one of its first three checkpoints is half there, and kills."""
    number, before = draw.randrange(3), newest(life.workdir)
    while life.process.poll() is None:
        if life.saves() and (newest(life.workdir) or 0) >= (before or 0) + number:
            time.sleep(draw.uniform(0.0, 0.05))
            break
        time.sleep(0.001)
    return life.kill()


def torture(start: Callable[[], Life], draw: random.Random, span: float, kills: list):
    """Kills and starts again, until the run has ended or all kills are made.

    Appends to `kills`, of which the entries not yet made are None, what the run was
    doing.
    """
    left: int | None = None
    while None in kills:
        number, life = kills.index(None), start()
        if number % 5 == 4:
            stage = kill_in_save(life, draw)
        else:
            time.sleep(draw.uniform(0.0, span))
            stage = life.kill()
        check_start(life, left)
        if stage is None:  # it was done
            left = newest(life.workdir)
            break
        kills[number], left = stage, newest(life.workdir)
        lived = time.monotonic() - life.started
        print(
            f"kill {number + 1:>2} {lived:6.1f} s  {stage:<10}  newest {left}",
            flush=True,
        )
    life = start()
    life.finish()
    check_start(life, left)


def check_start(life: Life, left: int | None) -> None:
    """Ends the benchmark if a run went on from another checkpoint than was left."""
    if life.went_on_after() not in (None, left) and left is not None:
        sys.exit(f"went on after {life.went_on_after()}, and {left} was left")


def differences(workdir: pathlib.Path, other: pathlib.Path) -> dict[str, list[str]]:
    """By kind of file what is not the same in two runs."""

    def rows(folder):
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        timed = lambda name: name.startswith("time/")
        return [
            {k: x for k, x in json.loads(line).items() if not timed(k)}
            for line in lines
        ]

    def texts(folder):
        paths = [*folder.glob("responses/*"), folder / "samples.md"]
        return {path.name: path.read_bytes() for path in paths}

    def unequal(mine, others):
        names = sorted({*mine, *others})
        same = lambda x, y: np.array_equal(x, y) and type(x) is type(y)
        return [n for n in names if not same(mine.get(n), others.get(n))]

    pairs = [(read(workdir), read(other)) for read in (rows, texts, saved)]
    metrics, said, weights = pairs
    numbered = [dict(enumerate(part)) for part in metrics]
    return {
        f"metrics.jsonl, {len(metrics[1])} rows": unequal(*numbered),
        f"responses and samples, {len(said[1])} files": unequal(*said),
        f"last checkpoint, {len(weights[1])} tensors": unequal(*weights),
    }


def saved(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of the last checkpoint and of the export."""
    import jax
    import orbax.checkpoint as ocp
    from safetensors.numpy import load_file

    step = workdir / "checkpoints" / str(newest(workdir))
    found = load_file(workdir / "export" / "model.safetensors")
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("policy", "train"):
            tree = checkpointer.restore(step.absolute() / item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def measure(args: argparse.Namespace, folder: pathlib.Path) -> bool:
    """Both runs, the table, and whether they are the same."""
    cache = folder / "xla"
    began = time.monotonic()
    life = Life(folder / "straight", args.phases, cache)
    life.finish()
    took = time.monotonic() - began
    # With everything compiled: how long a start takes up to its first save.
    life = Life(folder / "trial", args.phases, cache)
    while not half_saved(life.workdir):
        time.sleep(0.01)
    first_save = time.monotonic() - life.started
    life.kill()
    print(f"left alone: {took:.0f} s; first save after {first_save:.1f} s")
    kills: list[str | None] = [None] * args.kills
    draw, found = random.Random(args.seed), collections.defaultdict(list)
    while None in kills:
        workdir = folder / f"killed_{kills.index(None)}"
        start = functools.partial(Life, workdir, args.phases, cache)
        torture(start, draw, 3 * first_save, kills)
        for name, unequal in differences(workdir, folder / "straight").items():
            found[name] += unequal
    print("\n| killed in | times |\n|---|---|")
    for stage in STAGES:
        print(f"| {stage} | {kills.count(stage)} |")
    print("\n| compared | different |\n|---|---|")
    for name, unequal in found.items():
        print(f"| {name} | {', '.join(map(str, unequal[:4])) or 'none'} |")
    return not any(found.values())


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--marked"]:
        run_marked(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--phases", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="an empty folder for the runs, which stays")
    args = parser.parse_args()
    versions = [
        f"{n} {importlib.metadata.version(n)}" for n in ("jax", "orbax-checkpoint")
    ]
    print(
        f"{datetime.date.today()}, {', '.join(versions)}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores ({platform.machine()})"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.keep or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        same = measure(args, folder)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()

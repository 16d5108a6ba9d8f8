"""Runs of several methods side by side: what each gained, and at what price.

All runs start from one model and are measured on the same held-out prompts, so the
rewards before and after are pairs, and a gain has an interval. Everything is read from
the runs' own files.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from rlhf_jax import run_files
from rlhf_jax.analysis.statistics import Interval
from rlhf_jax.errors import UserError
from rlhf_jax.text_signals import distinct_pairs, repeats_itself

REACHED = 0.9  # of the final gain: how far a run has converged


class Measured(NamedTuple):
    """One method's run in figures.

    Attributes:
      before, after: mean held-out reward of the starting model and of the trained one.
      gain: of the reward, paired over the held-out prompts.
      judges: the same gain by each judge, none of which was trained on.
      kl: nats a held-out response.
      entropy: nats a token, None where the method does not measure it.
      tokens: mean length of a held-out response.
      distinct: distinct pairs of words over all pairs, of the held-out responses.
      repeats: held-out responses that say three words in a row twice, a fraction.
      roughness: standard deviation of the held-out reward about its running best, a
        measure of how stable training was; 0 for a run that only rises.
      phases_to: phases until nine tenths of the gain were there; None without a gain.
      seconds_to: the same in seconds of training.
      seconds: of training in all.
      phase_seconds: median of a phase.
      samples_per_s: responses or pairs learned from, over the seconds.
      peak_gib: peak memory, None where it was not measured.
    """

    before: float
    after: float
    gain: Interval
    judges: dict[str, Interval]
    kl: float
    entropy: float | None
    tokens: float
    distinct: float
    repeats: float
    roughness: float
    phases_to: int | None
    seconds_to: float | None
    seconds: float
    phase_seconds: float
    samples_per_s: float
    peak_gib: float | None


def compare(workdirs: Mapping[str, str | os.PathLike]) -> dict[str, Measured]:
    """Measures each method's run folder.

    Raises:
      UserError: a run is not there, or has no held-out responses to compare.
    """
    return {name: measure(workdir) for name, workdir in workdirs.items()}


def measure(workdir: str | os.PathLike) -> Measured:
    """One run, from metrics.jsonl and the responses of its first and last phase."""
    rows = run_files.read_metrics(workdir)
    if len(rows) < 2 or "heldout/reward_mean" not in rows[-1]:
        raise UserError(
            f"{workdir} has no held-out reward after training: to compare it, finish "
            "the run, and give it rewards"
        )
    first, last = (_heldout(workdir, row["phase"]) for row in (rows[0], rows[-1]))
    judges = [key for key in last[0] if key.startswith("judge/")]
    points = [row for row in rows if "heldout/reward_mean" in row]
    seconds = np.cumsum([row.get("time/phase_s", 0.0) for row in rows])
    at = dict(zip((row["phase"] for row in rows), seconds.tolist(), strict=True))
    reached = _reached([row["heldout/reward_mean"] for row in points])
    phase = None if reached is None else points[reached]["phase"]
    texts = [row["response"] for row in last]
    peaks = [row["time/peak_gib"] for row in rows if "time/peak_gib" in row]
    entropies = [row["policy/entropy"] for row in rows if "policy/entropy" in row]
    return Measured(
        before=_mean(first, "reward"),
        after=_mean(last, "reward"),
        gain=paired_gain(first, last, "reward"),
        judges={
            key.removeprefix("judge/"): paired_gain(first, last, key) for key in judges
        },
        kl=rows[-1]["heldout/kl"],
        entropy=entropies[-1] if entropies else None,
        tokens=_mean(last, "tokens"),
        distinct=distinct_pairs(texts),
        repeats=float(np.mean([repeats_itself(text) for text in texts])),
        roughness=roughness([row["heldout/reward_mean"] for row in points]),
        phases_to=phase,
        seconds_to=None if phase is None else at[phase],
        seconds=float(seconds[-1]),
        phase_seconds=float(np.median([row["time/phase_s"] for row in rows[1:]])),
        samples_per_s=_samples(workdir, rows[-1]["phase"]) / float(seconds[-1]),
        peak_gib=max(peaks) if peaks else None,
    )


def paired_gain(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], key: str
) -> Interval:
    """Mean of after − before over the same prompts, with Student's 95 % interval."""
    start = {row["index"]: row for row in before}
    pairs = [(start[row["index"]], row) for row in after if row["index"] in start]
    if any(old["prompt"] != new["prompt"] for old, new in pairs) or len(pairs) < 2:
        raise UserError(
            "the held-out prompts of the first and the last phase are not the same, so "
            "a gain cannot be measured on them"
        )
    difference = np.array([new[key] - old[key] for old, new in pairs], np.float64)
    mean = float(difference.mean())
    half = float(stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference))
    return Interval(mean, mean - half, mean + half)


def roughness(values: Sequence[float]) -> float:
    """Root mean square of how far each value is below the best before it."""
    best = np.maximum.accumulate(np.asarray(values, np.float64))
    return float(np.sqrt(np.mean(np.square(best - values))))


def to_json(measured: Mapping[str, Measured]) -> str:
    """The comparison as text that other programs read."""
    plain = {
        name: row._asdict()
        | {
            "gain": row.gain._asdict(),
            "judges": {judge: gain._asdict() for judge, gain in row.judges.items()},
        }
        for name, row in measured.items()
    }
    return json.dumps(plain, indent=2) + "\n"


def table(measured: Mapping[str, Measured]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: a figure a row, a method a column."""
    number = lambda value, form: "–" if value is None else format(value, form)
    spread = lambda gain: f"{gain.mean:+.2f} ± {gain.high - gain.mean:.2f}"
    judges = list(next(iter(measured.values())).judges)
    figures = {
        "held-out reward before": lambda m: f"{m.before:+.2f}",
        "held-out reward after": lambda m: f"{m.after:+.2f}",
        "gain, ± is 95 %": lambda m: spread(m.gain),
        **{
            f"gain by judge {judge}": lambda m, judge=judge: spread(m.judges[judge])
            for judge in judges
        },
        "KL, nats a response": lambda m: f"{m.kl:.2f}",
        "entropy, nats a token": lambda m: number(m.entropy, ".2f"),
        "tokens a response": lambda m: f"{m.tokens:.1f}",
        "distinct word pairs": lambda m: f"{m.distinct:.2f}",
        "that repeat themselves": lambda m: f"{m.repeats:.0%}",
        "roughness of the reward": lambda m: f"{m.roughness:.3f}",
        "phases to 90 % of it": lambda m: number(m.phases_to, "d"),
        "seconds to 90 % of it": lambda m: number(m.seconds_to, ".0f"),
        "seconds of training": lambda m: f"{m.seconds:.0f}",
        "seconds a phase": lambda m: f"{m.phase_seconds:.2f}",
        "samples a second": lambda m: f"{m.samples_per_s:.1f}",
        "peak memory, GiB": lambda m: number(m.peak_gib, ".2f"),
    }
    rows = [
        [label, *(figure(row) for row in measured.values())]
        for label, figure in figures.items()
    ]
    return ["", *measured], rows


def to_markdown(measured: Mapping[str, Measured]) -> str:
    """The table for a reader."""
    header, rows = table(measured)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _heldout(workdir: str | os.PathLike, phase: int) -> list[dict[str, Any]]:
    rows = run_files.read_responses(workdir, phase)
    return [row for row in rows if row["split"] == "heldout"]


def _samples(workdir: str | os.PathLike, phases: int) -> int:
    """How many responses or pairs the run has learned from."""
    config = json.loads((pathlib.Path(workdir) / "config.json").read_text("utf-8"))
    if "learning" in config:
        learning = config["learning"]
        return phases * learning["steps_per_phase"] * learning["batch"]
    return phases * config["rollout"]["prompts"] * config["rollout"].get("group", 1)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _reached(values: Sequence[float]) -> int | None:
    """The first of the values that has nine tenths of the final gain."""
    gain = values[-1] - values[0]
    if not math.isfinite(gain) or gain <= 0:
        return None
    return next(i for i, x in enumerate(values) if x - values[0] >= REACHED * gain)

"""The monitor at work in a training loop: it keeps the history and may end the run."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import hosts, monitor, run_files
from rlhf_jax.monitor import Alert, Row

LEAST_DROP = 0.2  # of a judge, in deviations: a smaller one is no alarm
JUDGE = "judge/"
HALTING = ("stop", "rollback")


class Watch:
    """Sees every row of metrics, in order, and tells what has gone wrong.

    All of it follows from the rows and the saved responses, so that a resumed run
    watches as the one that was never stopped. Whether the run ends process 0 decides,
    which has the files; the others hear of it.

    Attributes:
      alerts: all so far, those of the run's earlier processes too.
      halted: the alert that ends the training, or None; by `config.monitor.action`.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        files: run_files.RunFiles,
        say: Callable[[str], None],
        *,
        done: int | None,
    ):
        """Reads what the run has so far.

        Args:
          settings: `config.monitor`.
          files: of the run.
          say: gets a sentence for each alert.
          done: phases after which the run goes on; None for a fresh one.
        """
        self._rules = monitor.rules_of(settings)
        self._settings, self._files, self._say = settings, files, say
        self._rows: list[Row] = []
        self.alerts: list[Alert] = []
        self.halted: Alert | None = None
        self._best: dict[str, tuple[float, float, dict[int, float]]] = {}
        if done is None:
            return
        saved = set(run_files.response_phases(files.workdir))
        for row in run_files.read_metrics(files.workdir):
            if row["phase"] > done:
                continue
            if row["phase"] in saved:
                said = run_files.read_responses(files.workdir, row["phase"])
                self._remember(_heldout(said))
            self._note(row)
        self._agree()

    def see(self, phase: int, metrics: Row) -> None:
        """Takes the metrics of one phase, and says and writes down what is wrong."""
        fresh = self._note({"phase": phase} | dict(metrics))
        self._agree()
        for alert in fresh:
            self._say(f"ALERT at phase {phase}, {alert.rule}: {alert.reason}")
            self._say(f"  what to do: {alert.advice}")
        if fresh and jax.process_index() == 0:
            with self._files.alerts.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(a._asdict()) + "\n" for a in fresh)

    def would_halt(self, phase: int, metrics: Row) -> bool:
        """Whether the metrics of a phase, which `see` gets later, end the training.

        They are waited for only where the monitor may end it.
        """
        if self._settings["action"] not in HALTING:
            return False
        rows = [*self._rows, {"phase": phase} | jax.device_get(dict(metrics))]
        patience = self._settings["patience"]
        found = bool(monitor.check(self._rules, rows, patience=patience))
        return json.loads(_of_first(json.dumps(found)))

    def judge_drop(self, rows: Sequence[Row]) -> dict[str, float]:
        """The metric `heldout/judge_drop_p` of an evaluation's rows, if it has judges.

        Each judge's scores are held against those of the evaluation where their mean
        was greatest, over the same prompts: the p-value of a drop, one-sided, times the
        number of judges and of the pairs of evaluations that may have been compared. It
        is 1 where the reward has not held either, or the drop is below a fifth of a
        deviation.
        """
        heldout = _heldout(rows)
        judges = [name for name in (heldout[0] if heldout else {}) if _is_judge(name)]
        if not judges:
            return {}
        reward = float(np.mean([row["reward"] for row in heldout]))
        before = sum("heldout/reward_mean" in row for row in self._rows)
        looks = len(judges) * before * (before + 1)
        p_values = [1.0]
        for name in judges:
            if name not in self._best or reward < self._best[name][1]:
                continue
            best, now = _paired(self._best[name][2], heldout, name)
            drop = best.mean() - now.mean()
            if drop > LEAST_DROP * best.std():
                from scipy import stats  # takes a while, and is seldom needed

                test = stats.ttest_rel(best, now, alternative="greater")
                p_values.append(min(1.0, looks * float(test.pvalue)))
        self._remember(heldout)
        return {"heldout/judge_drop_p": min(p_values)}

    def _note(self, row: Row) -> list[Alert]:
        self._rows.append(row)
        found = monitor.check(
            self._rules, self._rows, patience=self._settings["patience"]
        )
        self.alerts += found
        if found and self._settings["action"] in HALTING:
            self.halted = self.halted or found[0]
        return found

    def _agree(self) -> None:
        """Halts for what process 0 halts for."""
        if self._settings["action"] in HALTING:
            said = _of_first(json.dumps(self.halted and self.halted._asdict()))
            self.halted = (found := json.loads(said)) and Alert(**found)

    def _remember(self, heldout: Sequence[Row]) -> None:
        """Keeps each judge's scores of the evaluation where their mean is greatest."""
        for name in heldout[0] if heldout else ():
            if not _is_judge(name):
                continue
            mean = float(np.mean([row[name] for row in heldout]))
            if name not in self._best or mean > self._best[name][0]:
                reward = float(np.mean([row["reward"] for row in heldout]))
                scores = {row["index"]: row[name] for row in heldout}
                self._best[name] = mean, reward, scores


def _of_first(text: str) -> str:
    return hosts.exchange(text.encode())[0].decode()


def _heldout(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("split") == "heldout"]


def _is_judge(name: str) -> bool:
    return name.startswith(JUDGE)


def _paired(
    before: Mapping[int, float], rows: Sequence[Row], name: str
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(before[r["index"]], r[name]) for r in rows if r["index"] in before]
    old, new = np.array(pairs, np.float64).reshape(-1, 2).T
    return old, new

"""When, how and why a policy went wrong, from the checkpoints of its run.

    analyzer = AlignmentAnalyzer("runs/ppo")
    analyzer.analyze_alignment_degradation()
    analyzer.detect_anomalies()
    analyzer.compare_phases(0, 30)
    analyzer.generate_responses_from_checkpoint(30)
    analyzer.write_report()

Every phase answers the same prompts from the same keys, those of the run's own held-out
evaluation, so that phases are compared in pairs. The first phase looked at is the
baseline that thresholds come from. Numbers come with 95 % intervals over prompts.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import progress, run_files
from rlhf_jax.analysis import answers, compared, findings
from rlhf_jax.analysis.anomalies import Anomaly, find_anomalies, onset
from rlhf_jax.analysis.evidence import Evidence, from_files, gather
from rlhf_jax.analysis.history import full_history, sample_rows
from rlhf_jax.analysis.report.page import render_page
from rlhf_jax.analysis.report.terminal import show_findings
from rlhf_jax.analysis.samples import PhaseSamples
from rlhf_jax.analysis.subject import (
    Subject,
    known_phases,
    open_subject,
    policy_of,
    read_config,
    saved_phases,
)
from rlhf_jax.analysis.summary import summarize
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.pages import write_files

SAMPLE_CHARACTERS = 80  # of a text in the table of phases


class AlignmentAnalyzer:
    """The phases of one run, to be asked.

    Weights are restored one phase at a time; what was measured is kept, so that further
    questions about the same phases, with as many samples, cost nothing.
    """

    def __init__(
        self,
        run: str | os.PathLike,
        *,
        mesh: Mesh | None = None,
        num_samples: int = 64,
        seed: int = 0,
    ):
        """Opens a run; its models are loaded when they are first needed.

        Args:
          run: the folder that a training wrote to; it may be going on.
          mesh: where to compute; None for all devices, cut as in the run.
          num_samples: answers of each phase, where a call names no number.
          seed: of the bootstrap and the permutation tests.

        Raises:
          UserError: there is no run, or none of its phases was saved.
        """
        self.workdir = pathlib.Path(run).expanduser()
        self.config = read_config(self.workdir)
        self.phases = known_phases(self.workdir)
        if not self.phases:
            raise UserError(
                f"{self.workdir} has no phase to analyse yet: neither a checkpoint nor "
                "responses were saved; of a pipeline give a stage, as its folder ppo"
            )
        self._console = progress.make_console()
        self._mesh, self._num_samples, self._seed = mesh, num_samples, seed
        self._subject: Subject | None = None
        self._answer: dict[float | None, Any] = {}
        self._evidence: dict[tuple, Evidence] = {}

    @property
    def subject(self) -> Subject:
        """The run's models, prompts and rewards."""
        if self._subject is None:
            self._subject = open_subject(
                self.workdir, mesh=self._mesh, console=self._console
            )
        return self._subject

    def evidence(
        self, phases: Sequence[int] | None = None, num_samples: int | None = None
    ) -> Evidence:
        """The answers of some phases and what was measured on their weights.

        A phase that was never saved, or cannot be read, is reported and left out.

        Raises:
          UserError: none of the phases is left.
        """
        count = self._count(num_samples)
        wanted = self.phases if phases is None else sorted(set(phases))
        there = [phase for phase in wanted if phase in self.phases]
        for phase in sorted(set(wanted) - set(there)):
            self._say(f"phase {phase} is left out: it was not saved")
        if not there:
            raise UserError(
                f"{self.workdir} has none of the phases {_listed(wanted)}; saved are "
                + _listed(self.phases)
            )
        key = tuple(there), count
        if key not in self._evidence:
            self._evidence[key] = self._gather(there, count)
        return self._evidence[key]

    def analyze_alignment_degradation(
        self, phases: Sequence[int] | None = None, num_samples: int | None = None
    ) -> dict[int, dict[str, Any]]:
        """Reward, drift, diversity and length of each phase, shown as a table.

        Args:
          phases: None for all that were saved.
          num_samples: answers of each.

        Returns:
          phase -> the keys of `summary.summarize`.
        """
        found = {
            phase: summarize(samples, seed=self._seed)
            for phase, samples in self.evidence(phases, num_samples).samples.items()
        }
        header = ["phase", "reward", "std", "min", "max", "KL", "length", "sample"]
        rows = []
        for phase, row in found.items():
            mean, means = row["means"]["reward"], row["means"]
            kl = f"{means['kl'].mean:.2f}" if "kl" in means else "–"
            text = row["samples"][0]["response"][:SAMPLE_CHARACTERS]
            rows.append(
                [
                    str(phase),
                    f"{mean.mean:+.2f} ± {mean.high - mean.mean:.2f}",
                    *(f"{row[f'{k}_reward']:.2f}" for k in ("std", "min", "max")),
                    *(kl, f"{means['characters'].mean:.0f}", text),
                ]
            )
        progress.show_table(self._console, "Alignment over phases", header, rows)
        return found

    def detect_anomalies(
        self,
        phases: Sequence[int] | None = None,
        num_samples: int | None = None,
        *,
        threshold: float | None = None,
        rate: float = 0.05,
    ) -> dict[str, Any]:
        """What is odd about the answers of some phases, beside the first of them.

        Args:
          phases: None for all that were saved; the first is the baseline.
          num_samples: answers of each.
          threshold: rewards below it are low in any case; None judges by the baseline.
          rate: of false discoveries, over all tests.

        Returns:
          low_reward_samples: [{phase, sample_idx, reward, text}];
          high_variance_phases: [{phase, std_reward, mean_reward}];
          unusual_responses: [{phase, sample_idx, length, text}], lengths in characters;
          anomalies: all of them, as `anomalies.Anomaly`, each with its reason;
          onset: the first phase from which on something is wrong, or None.
        """
        samples = list(self.evidence(phases, num_samples).samples.values())
        found = self._anomalies(samples, rate)
        single = [a for a in found if a.sample_idx is not None]
        low = {(a.phase, a.sample_idx) for a in single if a.kind == "low_reward"}
        odd = {
            (a.phase, a.sample_idx): a.text for a in single if a.kind != "low_reward"
        }
        wide = [a.phase for a in found if a.kind == "reward_variance"]
        if threshold is not None:
            low |= {
                (one.phase, int(row))
                for one in samples
                for row in np.flatnonzero(one.scores["reward"] < threshold)
            }
        by_phase = {one.phase: one for one in samples}
        return {
            "low_reward_samples": [
                {
                    "phase": phase,
                    "sample_idx": row,
                    "reward": float(by_phase[phase].scores["reward"][row]),
                    "text": by_phase[phase].responses[row],
                }
                for phase, row in sorted(low)
            ],
            "high_variance_phases": [
                {
                    "phase": phase,
                    "std_reward": float(by_phase[phase].scores["reward"].std()),
                    "mean_reward": float(by_phase[phase].scores["reward"].mean()),
                }
                for phase in wide
            ],
            "unusual_responses": [
                {"phase": phase, "sample_idx": row, "length": len(text), "text": text}
                for (phase, row), text in sorted(odd.items())
            ],
            "anomalies": found,
            "onset": onset(found, [one.phase for one in samples]),
        }

    def compare_phases(
        self, phase1: int, phase2: int, num_samples: int = 20
    ) -> dict[str, Any]:
        """Two phases over the same prompts, side by side.

        Returns:
          phase1, phase2: their figures, as `summary.summarize`;
          reward_change: of the mean; variance_change: of the variance;
          comparison: the paired tests and texts, a `compared.Comparison`.

        Raises:
          UserError: one of the phases cannot be had.
        """
        for phase in (phase1, phase2):
            if phase not in self.phases:
                saved = _listed(self.phases)
                raise UserError(f"{self.workdir} has no phase {phase}, only {saved}")
        found = self.evidence([phase1, phase2], num_samples)
        if found.skipped:
            raise UserError("; ".join(found.skipped.values()))
        sides = [found.samples[phase] for phase in (phase1, phase2)]
        rewards = [side.scores["reward"].astype(np.float64) for side in sides]
        return {
            "phase1": summarize(sides[0], seed=self._seed),
            "phase2": summarize(sides[1], seed=self._seed),
            "reward_change": float(rewards[1].mean() - rewards[0].mean()),
            "variance_change": float(rewards[1].var() - rewards[0].var()),
            "comparison": compared.compare(*sides, seed=self._seed),
        }

    def generate_responses_from_checkpoint(
        self,
        phase: int,
        num_samples: int = 10,
        *,
        temperature: float | None = None,
        split: str = "heldout",
    ) -> dict[str, Any]:
        """Answers of one saved policy.

        At the run's own temperature they are, token for token, those that the training
        drew: on "heldout" prompts in its evaluation after this phase, on "train" in the
        rollout that followed.

        Args:
          phase: of a saved checkpoint.
          num_samples: how many.
          temperature: None for the run's own; 0 is greedy.
          split: "heldout" or "train".

        Returns:
          phase, samples ([{prompt, response, reward, ...}]), rewards, and of these
          mean_reward, std_reward, min_reward, max_reward.

        Raises:
          UserError: no such phase, or its weights cannot be read.
        """
        count, subject = self._count(num_samples), self.subject
        if split not in answers.SPLITS:
            raise UserError(f"split={split!r} is none of {', '.join(answers.SPLITS)}")
        with jax.set_mesh(subject.mesh):
            if split == "heldout":
                asked = answers.heldout_questions(subject, count)
            else:
                asked = answers.training_questions(subject, phase, count)
            if temperature not in self._answer:
                self._answer[temperature] = answers.make_answer(subject, temperature)
            policy = policy_of(subject, phase)
            found, _ = self._answer[temperature](policy, phase, asked)
        rewards = found.scores["reward"]
        return {
            "phase": phase,
            "samples": sample_rows(found),
            "rewards": rewards.tolist(),
            "mean_reward": float(rewards.mean()),
            "std_reward": float(rewards.std()),
            "min_reward": float(rewards.min()),
            "max_reward": float(rewards.max()),
        }

    def findings(
        self, phases: Sequence[int] | None = None, num_samples: int | None = None
    ) -> findings.Findings:
        """Everything at once: what the report shows."""
        evidence = self.evidence(phases, num_samples)
        decode = None
        if evidence.weights:
            decode = functools.partial(
                self.subject.tokenizer.decode, clean_up_tokenization_spaces=False
            )
        anomalies = self._anomalies(list(evidence.samples.values()), 0.05)
        return findings.make_findings(
            self.workdir, self.config, evidence, anomalies, decode, seed=self._seed
        )

    def write_report(
        self,
        folder: str | os.PathLike | None = None,
        *,
        phases: Sequence[int] | None = None,
        num_samples: int | None = None,
    ) -> list[pathlib.Path]:
        """Writes report.html, analysis.json and full_responses_history.json.

        Args:
          folder: None for `analysis` in the run's folder.
          phases, num_samples: as of the other calls.

        Returns:
          The paths, the page first.

        Raises:
          UserError: the folder cannot be written.
        """
        found = self.findings(phases, num_samples)
        show_findings(self._console, found)
        paths = write_files(
            folder or self.workdir / "analysis",
            {
                "report.html": render_page(found),
                "analysis.json": findings.as_json(found),
                "full_responses_history.json": findings.as_json(self.history()),
            },
        )
        for path in paths:
            self._say(f"wrote {path}")
        return paths

    def history(self) -> list[dict[str, Any]]:
        """Every answer that the run saved and this analysis drew, phase by phase."""
        drawn = [x for one in self._evidence.values() for x in one.samples.values()]
        return full_history(self.workdir, drawn)

    def _gather(self, phases: Sequence[int], count: int) -> Evidence:
        """From the weights where they can be had, else from the saved responses."""
        said = run_files.response_phases(self.workdir, "heldout")
        try:
            if not saved_phases(self.workdir):
                raise UserError("no checkpoint is left")
            subject = self.subject
        except UserError as error:
            if not set(said) & set(phases):
                raise
            there = [phase for phase in phases if phase in said]
            found = from_files(self.workdir, there, count)
            if not found.samples:
                raise UserError(f"{error}, and {found.skipped[there[0]]}") from error
            self._say(f"{error}; so the saved responses are analysed")
        else:
            most = len(subject.prompts["heldout"].texts)
            if count > most:  # answers to one prompt are no independent samples
                self._say(f"num_samples is {most}: there are no more held-out prompts")
            found = gather(
                subject,
                phases,
                num_samples=min(count, most),
                show=lambda done: self._say(f"phase {phases[done - 1]}: measured"),
            )
        for phase, why in found.skipped.items():
            self._say(f"phase {phase}: {why}")
        if not found.samples:
            raise UserError(
                f"none of the phases {_listed(phases)} of {self.workdir} can be read: "
                + found.skipped[phases[0]]
            )
        return found

    def _anomalies(self, samples: Sequence[PhaseSamples], rate: float) -> list[Anomaly]:
        return find_anomalies(samples[0], samples[1:], rate=rate)

    def _count(self, num_samples: int | None) -> int:
        count = self._num_samples if num_samples is None else num_samples
        if count < 2:
            raise UserError(f"num_samples={count} must be at least 2")
        return count

    def _say(self, text: str) -> None:
        progress.say(self._console, text)


def _listed(phases: Sequence[int]) -> str:
    return ", ".join(map(str, phases))

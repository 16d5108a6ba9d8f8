"""Every answer of a run, phase by phase."""

import os
from collections.abc import Iterable
from typing import Any

from rlhf_jax import run_files
from rlhf_jax.analysis.compared import measures
from rlhf_jax.analysis.samples import PhaseSamples


def sample_rows(samples: PhaseSamples) -> list[dict[str, Any]]:
    """One row a sample, as runs keep them in `responses/`."""
    columns = measures(samples)
    return [
        {
            "phase": samples.phase,
            "index": row,
            "prompt": samples.prompts[row],
            "response": samples.responses[row],
            **{name: float(values[row]) for name, values in columns.items()},
        }
        for row in range(len(samples.prompts))
    ]


def full_history(
    workdir: str | os.PathLike, drawn: Iterable[PhaseSamples]
) -> list[dict[str, Any]]:
    """Every answer that the run saved and the analysis drew, phase by phase.

    Args:
      workdir: the run's folder; its rows are as `rollout.sampler.records` made them.
      drawn: by the analysis; of a phase that comes twice the larger is taken. Their
        split is "analysis".
    """
    largest: dict[int, PhaseSamples] = {}
    for samples in drawn:
        other = largest.get(samples.phase)
        if other is None or len(samples.prompts) > len(other.prompts):
            largest[samples.phase] = samples
    saved = run_files.response_phases(workdir)
    rows = []
    for phase in sorted({*saved, *largest}):
        if phase in saved:
            said = run_files.read_responses(workdir, phase)
            rows += [{"phase": phase} | row for row in said]
        if phase in largest:
            rows += [{"split": "analysis"} | row for row in sample_rows(largest[phase])]
    return rows

"""How many programs XLA compiles in a run, which its last line says."""

import re
import subprocess

import pytest

from tests.trainers.runs import ROOT, command


@pytest.mark.slow
def test_more_phases_compile_no_more(world, alone, tmp_path):
    """A whole run of PPO is some thirty programs, however long it is."""
    counts = []
    for phases in (2, 4):
        workdir = tmp_path / str(phases)
        done = subprocess.run(
            [*command(world, "ppo", workdir), f"--config.total_phases={phases}"],
            cwd=ROOT,
            env=alone,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told = re.search(r"(\d+) programs compiled in [\d.]+ s", done.stdout)
        assert told, done.stdout
        counts.append(int(told[1]))
    assert counts[0] == counts[1] <= 36

"""The command line of the analysis, and the call that trains first."""

import json
import subprocess
import sys

import pytest

from rlhf_jax import analyze
from rlhf_jax.errors import UserError
from rlhf_jax.run_files import append_metrics, open_run, write_responses


def saved_run(folder, phases=(0, 5)):
    """A run of which only the responses are left."""
    files = open_run(folder, {"algorithm": "ppo"})
    for phase in phases:
        append_metrics(files, {"phase": phase})
        rows = [
            {
                "split": "heldout",
                "prompt": f"Prompt {i}",
                "response": f" word{i} word{i + phase} of phase {phase}.",
                "reward": 0.1 * i + phase,
                "finish": "eos",
                "index": i,
            }
            for i in range(8)
        ]
        write_responses(files, phase, rows)
    return folder


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rlhf_jax.analyze", *arguments],
        capture_output=True,
        text=True,
    )


def test_the_command(tmp_path):
    run = saved_run(tmp_path / "run")
    found = command(f"--run={run}", "--num_samples=8")
    assert found.returncode == 0 and found.stderr == ""
    assert "no checkpoint is left; so the saved responses are analysed" in found.stdout
    folder = run / "analysis"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("analysis.json", "full_responses_history.json", "report.html"),
    ]
    written = json.loads((folder / "analysis.json").read_text("utf-8"))
    assert list(written["summaries"]) == ["0", "5"]
    reward = written["comparisons"]["5"]["scores"]["reward"]
    assert reward["change"]["mean"] == pytest.approx(5.0)
    history = json.loads((folder / "full_responses_history.json").read_text("utf-8"))
    saved = [row for row in history if row["split"] == "heldout"]
    assert [row["phase"] for row in saved] == [0] * 8 + [5] * 8


def test_chosen_phases_and_another_folder(tmp_path, capsys):
    run = saved_run(tmp_path / "run", phases=(0, 5, 9))
    paths = analyze.analyze(str(run), out=str(tmp_path / "out"), phases=["0", "9"])
    assert {path.parent for path in paths} == {tmp_path / "out"}
    written = json.loads((tmp_path / "out" / "analysis.json").read_text("utf-8"))
    assert list(written["summaries"]) == ["0", "9"]
    assert "report.html" in capsys.readouterr().out


def test_mistakes_are_sentences(tmp_path):
    found = command(f"--run={tmp_path / 'none'}")
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.startswith("error: there is no folder")
    with pytest.raises(UserError, match="--phases has 'x'"):
        analyze.analyze(str(saved_run(tmp_path / "run")), phases=["0", "x"])

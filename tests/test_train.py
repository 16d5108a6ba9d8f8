"""The command line: what it accepts, and one sentence and exit code 2 for the rest."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PPO = "--config=configs/ppo.py"


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rlhf_jax.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def complaint(*arguments):
    """The one line on stderr of a command that must fail."""
    done = run_command(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_no_config():
    assert "--config" in complaint()


def test_missing_config_file():
    line = complaint("--config=configs/nowhere.py")
    assert "config file" in line
    assert "configs/nowhere.py" in line


def test_unknown_key_names_the_nearest():
    line = complaint(PPO, "--config.ppo.kl_coeff=0.1")
    assert "kl_coeff" in line
    assert "kl_coef" in line.replace("kl_coeff", "")


def test_unknown_key_without_a_near_one():
    line = complaint(PPO, "--config.ppo.clip_ratio=0.3")
    assert "--config.ppo.clip_ratio: the config has no setting 'clip_ratio'" in line


def test_unknown_section():
    assert "pppo" in complaint(PPO, "--config.pppo.kl_coef=0.1")


def test_setting_without_a_config_file():
    line = complaint("--config.seed=1")
    assert "--config.seed needs the config file" in line


def test_no_config_file():
    assert "give --config=configs/ppo.py" in complaint()
    assert "there is no config file nope.py" in complaint("--config=nope.py")


def test_value_of_another_type():
    line = complaint(PPO, "--config.total_phases=many")
    assert "total_phases" in line
    assert "many" in line


def test_unknown_flag():
    assert "confg" in complaint(PPO, "--confg.seed=1")


def test_stray_argument(tmp_path):
    """A setting that was not understood must not be dropped in silence."""
    workdir = f"--config.workdir={tmp_path / 'run'}"
    assert "seed=1" in complaint(PPO, workdir, "--config.model=/nowhere", "seed=1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "invalid syntax"),
        ("import no_such_module\n", "no_such_module"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    raise ValueError('what a pity')\n", "what a pity"),
        (
            "from ml_collections import ConfigDict\n"
            "get_config = lambda: ConfigDict({'seed': 0})\n",
            "algorithm",
        ),
    ],
)
def test_broken_config_file(tmp_path, text, said):
    path = tmp_path / "broken.py"
    path.write_text(text, "utf-8")
    line = complaint(f"--config={path}")
    assert "broken.py" in line or "config" in line
    assert said in line


def test_unknown_algorithm():
    assert "config.algorithm='pop'" in complaint(PPO, "--config.algorithm=pop")


def test_what_goes_wrong_in_a_run(tmp_path):
    workdir = f"--config.workdir={tmp_path / 'run'}"
    line = complaint(PPO, workdir, "--config.model=/nowhere/model")
    assert "/nowhere/model is not a model directory" in line


def test_help_says_what_it_is():
    done = run_command("--help")
    assert "python -m rlhf_jax.train --config=configs/ppo.py" in done.stdout
    assert "Traceback" not in done.stderr

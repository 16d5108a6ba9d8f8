"""Trains a model as a config file says.

    python -m rlhf_jax.train --config=configs/ppo.py
    python -m rlhf_jax.train --config=configs/ppo.py --config.seed=1 \
        --config.workdir=runs/ppo_seed1

Every setting of the file can be given on the command line as `--config.<name>=<value>`.
The same command again goes on where a stopped run was, bit for bit.
"""

import contextlib
import functools
import importlib
import pathlib
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from rlhf_jax import compilations, progress
from rlhf_jax.command_line import run_command
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import joined

ALGORITHMS = {
    "cost_model": "rlhf_jax.trainers.reward_model",
    "dpo": "rlhf_jax.trainers.dpo",
    "grpo": "rlhf_jax.trainers.grpo",
    "pipeline": "rlhf_jax.pipeline",
    "ppo": "rlhf_jax.trainers.ppo",
    "reward_model": "rlhf_jax.trainers.reward_model",
    "sft": "rlhf_jax.trainers.sft",
}


@contextlib.contextmanager
def algorithm_of(config: ConfigDict) -> Iterator[Any]:
    """The module of the algorithm; what it looks for in vain in the config is told.

    Raises:
      UserError: there is no such algorithm, or the config lacks one of its settings.
    """
    if config.algorithm not in ALGORITHMS:
        raise UserError(
            f"config.algorithm={config.algorithm!r} is unknown; "
            f"take one of {', '.join(ALGORITHMS)}"
        )
    try:
        yield importlib.import_module(ALGORITHMS[config.algorithm])
    except AttributeError as error:
        *_, last = traceback.walk_tb(error.__traceback__)
        if "ml_collections" not in last[0].f_code.co_filename:
            raise
        raise UserError(
            f"the config has no setting {_quoted(error)[0]!r}, which "
            f"{config.algorithm} needs: see its file in configs/"
        ) from error


def train(config: ConfigDict) -> None:
    """Runs the algorithm that `config.algorithm` names.

    Raises:
      UserError: the config, the files it names or the machine do not allow it.
    """
    with algorithm_of(config) as algorithm:
        run = algorithm.run
        if config.algorithm == "pipeline":
            run = functools.partial(run, train=train)  # of its stages
        with contextlib.closing(compilations.watch()) as compiled:
            run(config)
            progress.say(progress.make_console(), f"{compiled.report()}")


def _parse(argv: Sequence[str]) -> list[str]:
    """absl's parser, with a sentence in place of its tracebacks."""
    try:
        left = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise UserError(
                f"--{error.flagname} needs the config file that it changes: give "
                "--config=configs/ppo.py, or another, before it"
            ) from error
        raise UserError(_sentence(error)) from error
    except flags.Error as error:
        where = "the config cannot be read: " if "Traceback" in str(error) else ""
        raise UserError(where + _sentence(error)) from error
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_setting(argv, str(error.args[0]))) from error
    except Exception as error:  # a config file is a program: it may raise anything
        raise UserError(f"the config cannot be read: {_sentence(error)}") from error
    if left[1:]:
        raise UserError(
            f"unknown argument {left[1]!r}; settings are given as --config.name=value"
        )
    return left


def _unknown_setting(argv: Sequence[str], message: str) -> str:
    """A sentence in place of ml_collections' own, which quotes one part of the name."""
    missing, nearest = _quoted(message)[:2]
    given = (part.partition("=")[0] for part in argv if part.startswith("--config."))
    flag = next((name for name in given if missing in name.split(".")), missing)
    hint = f"did you mean {nearest!r}?" if nearest else "see the config file for names"
    return f"{flag}: the config has no setting {missing!r}; {hint}"


def _quoted(message: object) -> list[str]:
    """The names in a message's quotation marks, then empty ones."""
    names = re.findall(r"['\"](\w+)['\"]", str(message).replace("\\", ""))
    return [*names, "", ""]


def _loaded(config) -> ConfigDict:
    """The config of the flag; an unreadable file is reported only when it is asked."""
    try:
        found = config.value
        if found is None:
            raise UserError("give --config=configs/ppo.py, or another config file")
        if not isinstance(found.get("algorithm"), str):
            raise UserError(
                "the config file sets no algorithm; "
                f"take one of {', '.join(ALGORITHMS)}"
            )
    except OSError as error:
        path = pathlib.Path(flags.FLAGS["config"].config_filename.partition(":")[0])
        if not path.exists():
            raise UserError(f"there is no config file {path}") from error
        raise UserError(
            f"the config file cannot be read: {_sentence(error.__cause__ or error)}"
        ) from error
    return found


def _sentence(message: object) -> str:
    """A message on one line; of a whole traceback in it only the end, the cause."""
    lines = str(message).strip().splitlines() or [type(message).__name__]
    told = lines[-1:] if "Traceback" in str(message) else lines
    return " ".join(" ".join(told).split())


def run_with_config(command: Callable[[Callable[[], ConfigDict]], None]) -> None:
    """Runs a command that is given a function to read the flag --config with.

    It may first join other hosts, so that all of them end if the file is wrong.
    """
    config = config_flags.DEFINE_config_file("config", None, "The config file.")
    logging.set_verbosity(logging.WARNING)
    run_command(lambda: command(lambda: _loaded(config)), parse=_parse)


def main() -> None:
    """The command line."""

    def command(read_config: Callable[[], ConfigDict]) -> None:
        with joined():
            train(read_config())

    run_with_config(command)


if __name__ == "__main__":
    main()

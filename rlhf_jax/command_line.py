"""What the command lines share: flags, and mistakes in one sentence."""

import inspect
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from rlhf_jax.errors import UserError


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with a sentence in place of its usage."""
    try:
        left = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    if left[1:]:
        raise UserError(f"unknown argument {left[1]!r}; give flags as --name=value")
    return left


def run_command(
    command: Callable[[], object],
    *,
    parse: Callable[[Sequence[str]], list[str]] = parse_flags,
) -> None:
    """Parses the flags, then runs the command.

    The exit status is 2 after a `UserError`, which is printed as a sentence, 130 after
    Ctrl-C, and 143 after SIGTERM. After the last two the same command goes on.
    """

    def run(_: Sequence[str]) -> None:
        command()  # what it returns would be taken for the exit status

    try:
        app.run(run, flags_parser=parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run_with_flags(command: Callable[..., object], first: str) -> None:
    """Runs a command whose keyword arguments are flags of the same names.

    Args:
      command: `command(<first>, *, ...)`.
      first: the flag of its one argument by position.
    """
    value = lambda name: flags.FLAGS[name].value
    keywords = inspect.unwrap(command).__kwdefaults__
    named = lambda: {name: value(name) for name in keywords}
    run_command(lambda: command(value(first), **named()))

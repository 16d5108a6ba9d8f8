"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in what the user gave: command lines print it without a traceback.

    The message is one sentence or two: what was given and where, what was expected,
    and what to do about it.
    """


def first_line(error: BaseException) -> str:
    """What an exception of another library says, short enough to quote."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

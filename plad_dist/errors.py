"""The two ways in which a command ends badly. Both are shown as one message, never as a traceback."""


class UserError(ValueError):
    """Something that the user gave is wrong; nothing was written. Exit code 2.

    The message names the file, row or key, says what was expected, and what to do.
    """


class RunFailed(RuntimeError):
    """A run that was started could not be finished. Exit code 1.

    The message says what happened, what was kept, and what to do.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

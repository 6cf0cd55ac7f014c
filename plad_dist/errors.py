"""The two errors with which a command ends. Both are shown as one message, without a traceback.

Raise :class:`UserError` if the user can fix the cause before anything is written, and
:class:`RunFailed` if something happened during the run. Use `assert` for invariants of the code.
"""


class UserError(ValueError):
    """An input of the user is wrong, and nothing was written. Exit code 2.

    The message names the file, row or key, and states what was expected and what to do.
    """


class RunFailed(RuntimeError):
    """A run could not be finished. Exit code 1.

    The message states what happened, what was kept, and what to do.
    """


def excerpt(value: object, length: int = 60) -> str:
    """Return the representation of a value, with dots at its end if it was cut."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def first_line(error: Exception) -> str:
    """Return the first line of an error message, or the class name of an error without message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

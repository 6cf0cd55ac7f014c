"""Checks at import of the names and signatures that this package relies on in another library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


class Assumptions:
    """Assumptions about one library.

    Each method raises ImportError if its assumption does not hold.

    Args:
        distribution: name of the library on the package index.
        written_for: version that the code was written for.
    """

    def __init__(self, distribution: str, written_for: str) -> None:
        self._distribution, self._written_for = distribution, written_for

    def attribute(self, owner: Any, name: str) -> Any:
        """Return an attribute of a module or class. Raise ImportError if it is missing."""
        try:
            return getattr(owner, name)
        except AttributeError:
            raise self._broken(f"{getattr(owner, '__name__', owner)} has no {name}") from None

    def parameters(self, function: Callable[..., Any], *names: str) -> None:
        """Check the names of a function's parameters, in order."""
        actual = tuple(inspect.signature(function).parameters)
        if actual != names:
            problem = f"{function.__qualname__} takes ({', '.join(actual)}), expected ({', '.join(names)})"
            raise self._broken(problem)

    def starts_with_parameters(self, function: Callable[..., Any], *names: str) -> None:
        """Check the names of a function's first parameters, in order."""
        actual = tuple(inspect.signature(function).parameters)[: len(names)]
        if actual != names:
            raise self._broken(f"{function.__qualname__} takes ({', '.join(actual)}, ...), expected {', '.join(names)}")

    def value(self, actual: Any, expected: Any, name: str) -> None:
        """Check the value of a constant."""
        if actual != expected:
            raise self._broken(f"{name} is {actual!r}, expected {expected!r}")

    def _broken(self, problem: str) -> ImportError:
        return ImportError(
            f"{self._distribution} {version(self._distribution)}: {problem}. plad-dist was written for "
            f"{self._distribution} {self._written_for}: install that version, or adapt plad_dist/compat"
        )

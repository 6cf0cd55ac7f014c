"""A problem that keeps a config from fitting, with its remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plad_dist.devices import GIB
from plad_dist.planning.sizes import ModelSize


@dataclass(frozen=True)
class Problem:
    """Something that does not fit.

    Attributes:
        description: the problem, with figures.
        remedies: config keys to change, the cheapest first.
        always: the largest worker group does not fit either. Otherwise only a group that shrinks to
            its smallest size would run out of memory.
    """

    description: str
    remedies: tuple[str, ...]
    always: bool = True

    def __str__(self) -> str:
        return self.description + "".join(f"\n    {remedy}" for remedy in self.remedies)

    def to_json(self) -> dict[str, Any]:
        """Return the problem as a JSON object; its description has the key `what`."""
        return {"what": self.description, "remedies": list(self.remedies), "always": self.always}


def gib(size: float) -> float:
    """Return bytes in GiB, rounded to two places."""
    return round(size / GIB, 2)


def parameters_text(size: ModelSize) -> str:
    """Return a model's number of parameters, such as `7.6B`."""
    return count_text(size.parameters)


def count_text(parameters: int) -> str:
    """Return a number of parameters, such as `7.6B` or `0.9M`."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"
